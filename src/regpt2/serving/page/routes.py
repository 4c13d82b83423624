"""The routes of the page to write with. In: the models; out: routes."""

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from regpt2.serving.models import Models


def page_routes(models: Models) -> list[Route]:
    """/ and its files."""

    async def page(_: Request) -> Response:
        return HTMLResponse("<!DOCTYPE html><title>regpt2</title>")

    return [Route("/", page)]
