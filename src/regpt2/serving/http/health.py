"""How the server is. In: the models and whether it stops; out: the route /health."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from regpt2.serving.http.exchange import Traffic
from regpt2.serving.models import Models


def health_routes(models: Models, traffic: Traffic) -> list[Route]:
    """/health: 200 while requests are taken, 503 once the server is about to stop; the load of each model."""

    async def health(_: Request) -> Response:
        loads = {}
        for name, served in models.items():
            load = served.engine.load()
            shown = {"slots": load.slots, "active": load.active, "waiting": load.waiting, "tokens": load.tokens}
            loads[name] = shown
        status = "draining" if traffic.draining else "ok"
        return JSONResponse({"status": status, "models": loads}, 503 if traffic.draining else 200)

    return [Route("/health", health)]
