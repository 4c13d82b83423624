"""The routes of the live runs. In: the runs folder; out: routes."""

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from regpt2.base.errors import Problem
from regpt2.pages.live.folders import find_run
from regpt2.pages.record import read_record
from regpt2.pages.report.page import page as report_page
from regpt2.pages.safe_html import Html, fill
from regpt2.serving.page.document import page_document
from regpt2.serving.page.static_files import files_in, static_route
from regpt2.serving.runs.channel import Channel, EventStream
from regpt2.serving.runs.channels import MOST_CLIENTS, Channels

FILES = Path(__file__).with_name("static")
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
"""Of the report, which has its style within and no script."""
NO_RUN = Html(
    '<main><h1>No such run</h1>\n<p class="faint">The <a href="/runs">list</a> shows all there are.</p></main>'
)


def runs_routes(folder: Path, *, names_are_open: bool = True) -> list[Route]:
    """/runs and its events at /runs-events; /runs/NAME, NAME/events, NAME/panels and NAME/report.

    Without `names_are_open` the page of a run, which has no data, does not reveal whether there is one.
    """
    runs = _Runs(folder, names_are_open=names_are_open)
    return [
        Route("/runs", runs.list_page),
        Route("/runs-events", runs.list_events),
        Route("/runs/{name:path}/events", runs.events),
        Route("/runs/{name:path}/panels", runs.panels),
        Route("/runs/{name:path}/report", runs.report),
        Route("/runs/{name:path}", runs.page),
        static_route("/static/runs", files_in(FILES)),
    ]


class _Runs:
    """What answers for a folder of runs."""

    def __init__(self, folder: Path, *, names_are_open: bool) -> None:
        self._folder, self._names_are_open = folder, names_are_open
        self._channels = Channels(folder)
        self._mains = {name: Html((FILES / f"{name}.html").read_text(encoding="utf-8")) for name in ("list", "run")}

    async def list_page(self, _: Request) -> Response:
        """The page of the list, without data."""
        return _page("regpt2: runs", self._mains["list"], "list.js")

    async def page(self, request: Request) -> Response:
        """The page of a run, without data."""
        name = request.path_params["name"]
        if self._names_are_open and find_run(self._folder, name) is None:
            return _page("regpt2: no such run", NO_RUN, None, 404)
        return _page(f"{name} · regpt2", self._mains["run"], "run.js")

    async def list_events(self, _: Request) -> Response:
        """The rows of the list, as they change."""
        return self._stream(self._channels.list())

    async def events(self, request: Request) -> Response:
        """Status, charts and texts of a run, as they change."""
        return self._stream(self._channels.run(self._found(request)))

    async def panels(self, request: Request) -> Response:
        """The charts of a run, once."""
        content = await self._channels.in_thread(self._channels.run(self._found(request)).panels)
        return Response(content, media_type="application/json", headers={"cache-control": "no-store"})

    async def report(self, request: Request) -> Response:
        """The report of a run as it is now; the file of a report is never served."""
        run = self._found(request)
        try:
            content = await self._channels.in_thread(lambda: report_page([read_record(run)]))
        except Problem:  # its message has the path
            raise HTTPException(422, "the record of this run is damaged, so there is no report") from None
        return HTMLResponse(content, headers={"content-security-policy": REPORT_POLICY, "cache-control": "no-store"})

    def _found(self, request: Request) -> Path:
        run = find_run(self._folder, request.path_params["name"])
        if run is None:
            raise HTTPException(404, "there is no run of this name")
        return run

    def _stream(self, channel: Channel) -> Response:
        if self._channels.n_clients >= MOST_CLIENTS:
            raise HTTPException(429, f"{MOST_CLIENTS} pages already watch runs; close one")
        return EventStream(channel)


def _page(title: str, main: Html, script: str | None, status: int = 200) -> Response:
    scripts = [f"/static/runs/{script}"] if script else []
    document = page_document(
        title, "runs", fill("{main}", main=main), styles=["/static/runs/runs.css"], scripts=scripts
    )
    return HTMLResponse(document, status, headers={"cache-control": "no-cache"})
