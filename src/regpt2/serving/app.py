"""The application. In: the models and the folder of runs; out: an ASGI application."""

from pathlib import Path

from starlette.applications import Starlette

from regpt2.serving.api.routes import api_routes
from regpt2.serving.models import Models
from regpt2.serving.page.routes import page_routes
from regpt2.serving.runs.routes import runs_routes


def build_app(models: Models, runs: Path) -> Starlette:
    """All routes."""
    return Starlette(routes=[*api_routes(models), *page_routes(models), *runs_routes(runs)])
