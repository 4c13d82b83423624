"""The routes of OpenAI's API. In: the models; out: routes."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from regpt2.serving.models import Models


def api_routes(models: Models) -> list[Route]:
    """/v1/models, and more to come."""

    async def list_models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in models]})

    return [Route("/v1/models", list_models)]
