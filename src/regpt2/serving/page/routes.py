"""The routes of the page to write with. In: the models; out: routes."""

import asyncio
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from regpt2.pages import PAGE_CSS
from regpt2.pages.safe_html import Html
from regpt2.serving.api.asking import served_by
from regpt2.serving.api.errors import JSON, as_api_error, error_answer
from regpt2.serving.api.fields import Fields, read_body
from regpt2.serving.models import Models
from regpt2.serving.page.attention import KNOWN, look, read_question
from regpt2.serving.page.document import page_document
from regpt2.serving.page.static_files import files_in, static_route

FILES = Path(__file__).with_name("static")


def page_routes(models: Models) -> list[Route]:
    """/, the files of all pages at /static, and /attention."""
    main = Html((FILES / "main.html").read_text(encoding="utf-8"))
    document = page_document("regpt2: write", "write", main, styles=["/static/write.css"], scripts=["/static/write.js"])

    async def page(_: Request) -> Response:
        return HTMLResponse(document, headers={"cache-control": "no-cache"})

    async def attention(request: Request) -> Response:
        body = await request.body()
        try:
            fields = Fields(read_body(body), KNOWN)
            served = served_by(fields, models)
            question = await asyncio.to_thread(read_question, fields, served)
            found = await asyncio.wrap_future(served.engine.between_steps(lambda: look(served, question)))
            return JSON(found)
        except Exception as error:
            return error_answer(as_api_error(error))

    return [
        Route("/", page),
        static_route("/static", {"report.css": PAGE_CSS, **files_in(FILES)}),
        Route("/attention", attention, methods=["POST"]),
    ]
