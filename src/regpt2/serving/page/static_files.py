"""Files that pages ask for. In: paths in the package; out: routes that answer with them, or with 304."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}  # by suffix


@dataclass(frozen=True)
class _File:
    content: bytes
    kind: str
    etag: str


def static_route(prefix: str, paths: Mapping[str, Path]) -> Route:
    """`prefix/NAME` answers with the file of that name. Each is read once, now: a later edit needs a new start."""
    files = {name: _read(path) for name, path in paths.items()}

    async def send(request: Request) -> Response:
        file = files.get(request.path_params["name"])
        if file is None:
            raise HTTPException(404, "There is no such file.")
        # no-cache: the browser asks each time, so a page never meets the script of another version.
        headers = {"etag": file.etag, "cache-control": "no-cache"}
        if file.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.kind, headers=headers)

    return Route(f"{prefix}/{{name}}", send)


def files_in(folder: Path) -> dict[str, Path]:
    """Name to path of every file in a folder that a page may ask for."""
    return {path.name: path for path in sorted(folder.iterdir()) if path.suffix in KINDS}


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, KINDS[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
