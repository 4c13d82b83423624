"""Models over HTTP. In: models; out: OpenAI's API, a page to write with, training runs live.

regpt2 serve runs/demo
"""

from collections.abc import Sequence

from regpt2.base.errors import Problem
from regpt2.base.options import parse
from regpt2.serving.options import ServeOptions


def main(argv: Sequence[str]) -> int:
    """`regpt2 serve MODEL ...`."""
    options = parse(ServeOptions, argv, "regpt2 serve")
    try:
        from regpt2.serving.http.server import serve  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise Problem(f"regpt2 serve needs starlette and uvicorn ({error}): pip install 'regpt2[serve]'.") from None
    return serve(options)
