"""The routes of the page to write with. In: the models; out: routes."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from regpt2.pages import PAGE_CSS
from regpt2.pages.safe_html import Html
from regpt2.serving.models import Models
from regpt2.serving.page.document import page_document
from regpt2.serving.page.static_files import files_in, static_route

FILES = Path(__file__).with_name("static")


def page_routes(models: Models) -> list[Route]:
    """/, and the files of all pages at /static."""
    main = Html((FILES / "main.html").read_text(encoding="utf-8"))
    document = page_document("regpt2: write", "write", main, styles=["/static/write.css"], scripts=["/static/write.js"])

    async def page(_: Request) -> Response:
        return HTMLResponse(document, headers={"cache-control": "no-cache"})

    return [Route("/", page), static_route("/static", {"report.css": PAGE_CSS, **files_in(FILES)})]
