"""The routes of the live runs. In: the runs folder; out: routes."""

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from regpt2.pages.live.folders import find_run
from regpt2.pages.record import read_record
from regpt2.pages.report.page import page
from regpt2.pages.safe_html import Html, fill
from regpt2.serving.page.document import page_document
from regpt2.serving.page.static_files import files_in, static_route
from regpt2.serving.runs.channel import EventStream
from regpt2.serving.runs.channels import MOST_CLIENTS, Channels

FILES = Path(__file__).with_name("static")
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
"""Of the report, which has its style within and no script."""
RUN_DATA = ("events", "panels", "report")
"""What is below the page of a run."""
NO_RUN = Html(
    '<main><h1>No such run</h1>\n<p class="faint">The <a href="/runs">list</a> shows all there are.</p></main>'
)


def runs_routes(folder: Path, *, names_are_open: bool = True) -> list[Route]:
    """/runs and its events at /runs-events; /runs/NAME, NAME/events, NAME/panels and NAME/report.

    Without `names_are_open` the page of a run, which has no data, does not reveal whether there is one.
    """
    channels = Channels(folder)
    mains = {name: Html((FILES / f"{name}.html").read_text(encoding="utf-8")) for name in ("list", "run")}

    def found(request: Request) -> Path:
        run = find_run(folder, request.path_params["name"])
        if run is None:
            raise HTTPException(404, "there is no run of this name")
        return run

    def stream(channel: object) -> Response:
        if channels.n_clients >= MOST_CLIENTS:
            raise HTTPException(429, f"{MOST_CLIENTS} pages already watch runs; close one")
        return EventStream(channel)  # type: ignore[arg-type]

    async def list_page(_: Request) -> Response:
        return _page("regpt2: runs", mains["list"], "list.js")

    async def run_page(request: Request) -> Response:
        name = request.path_params["name"]
        if names_are_open and find_run(folder, name) is None:
            return _page("regpt2: no such run", NO_RUN, None, 404)
        return _page(f"{name} · regpt2", mains["run"], "run.js")

    async def list_events(_: Request) -> Response:
        return stream(channels.list())

    async def run_events(request: Request) -> Response:
        return stream(channels.run(found(request)))

    async def panels(request: Request) -> Response:
        content = await channels.in_thread(channels.run(found(request)).panels)
        return Response(content, media_type="application/json", headers={"cache-control": "no-store"})

    async def report(request: Request) -> Response:
        run = found(request)
        content = await channels.in_thread(lambda: page([read_record(run)]))
        return HTMLResponse(content, headers={"content-security-policy": REPORT_POLICY, "cache-control": "no-store"})

    return [
        Route("/runs", list_page),
        Route("/runs-events", list_events),
        Route("/runs/{name:path}/events", run_events),
        Route("/runs/{name:path}/panels", panels),
        Route("/runs/{name:path}/report", report),
        Route("/runs/{name:path}", run_page),
        static_route("/static/runs", files_in(FILES)),
    ]


def _page(title: str, main: Html, script: str | None, status: int = 200) -> Response:
    scripts = [f"/static/runs/{script}"] if script else []
    document = page_document(
        title, "runs", fill("{main}", main=main), styles=["/static/runs/runs.css"], scripts=scripts
    )
    return HTMLResponse(document, status, headers={"cache-control": "no-cache"})
