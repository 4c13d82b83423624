"""The routes of the live runs. In: the runs folder; out: routes."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route


def runs_routes(folder: Path) -> list[Route]:
    """/runs, and what it asks for."""

    async def runs(_: Request) -> Response:
        return HTMLResponse("<!DOCTYPE html><title>runs</title>")

    return [Route("/runs", runs)]
