"""The application. In: the models and the folder of runs; out: an ASGI application behind its door."""

from collections.abc import Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from regpt2.serving.api.routes import api_routes
from regpt2.serving.http.access import Access
from regpt2.serving.http.door import Door
from regpt2.serving.http.errors import Refusal
from regpt2.serving.http.exchange import BROKEN, Limits, Traffic
from regpt2.serving.http.health import health_routes
from regpt2.serving.models import Models
from regpt2.serving.page.routes import page_routes
from regpt2.serving.runs.routes import runs_routes

PROGRAM_ONLY, ANYTHING = Access(), Limits()


def build_app(
    models: Models,
    runs: Path,
    *,
    access: Access = PROGRAM_ONLY,
    limits: Limits = ANYTHING,
    traffic: Traffic | None = None,
    log: Callable[[str], None] | None = None,
) -> Door:
    """All routes, behind the door. A test asks it as a client of http://127.0.0.1:PORT; other hosts are refused."""
    traffic = traffic or Traffic()
    routes = [*health_routes(models, traffic), *api_routes(models), *page_routes(models)]
    routes += runs_routes(runs, names_are_open=access.key is None)
    app = Starlette(routes=routes, exception_handlers={HTTPException: _in_openai_s_form, Exception: _broken})
    app.router.redirect_slashes = False
    return Door(app, access, limits, traffic, log)


async def _in_openai_s_form(_: Request, error: Exception) -> Response:
    """What the router finds: no such path, or not by this method."""
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    refused = Refusal(error.status_code, error.detail.rstrip(".") + ".", codes.get(error.status_code, "http_error"))
    headers = {"Content-Type": "application/json", **(error.headers or {})}
    return Response(refused.json(), error.status_code, headers)


async def _broken(_: Request, __: Exception) -> Response:
    """A mistake of ours: the door writes its traceback to the server's own standard error, never into an answer."""
    return Response(BROKEN.json(), BROKEN.status, {"Content-Type": "application/json"})
