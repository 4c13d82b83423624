"""A Hugging Face hub on loopback for tests. In: data sets as {id: {path: bytes}}; out: their files, and planted faults.

    with FakeHub({"me/texts": {"train.jsonl": b'{"text": "a"}\\n', "data/big.parquet": data}}) as hub:
        for name, value in hub.environment(tmp_path / "cache").items():  # or give it to a process
            monkeypatch.setenv(name, value)
        hub.plant("data/big.parquet", "dies", at=1000, times=3)  # the next 3 answers; times=None: all
        ...
        assert hub.n_sent("data/big.parquet") == len(data)

The same contents are served as models. An id may name a branch: "me/texts@refs/convert/parquet".
`cards={"me/texts": {"configs": [...]}}` is the YAML head of its README.md as the hub shows it. With `token` everything
wants "Authorization: Bearer <token>". A text file is served by the endpoint itself; any other by redirect to a second
address, `hub.cdn`, as large files are by the real one.

Faults, planted by path in a data set or by "api" (commits and listings), are used up in the order they were planted:

    slow       `at` bytes at a time with 10 ms between   short      announces all, ends in order after `at` bytes
    dies       resets the connection after `at` bytes    hangs      stays open and silent after `at` bytes
    wrong      other bytes of the same size              grows      `at` bytes more than the listing says
    rangeless  ignores Range                             badrange   another stretch than asked for, and says so
    page       an HTML page with status 200              chunked    no length announced; dies after `at`, if given
    status     status `at`, with Retry-After `after`     redirect   to the address `to`; by default to itself, forever
    stall      sends nothing for `at` seconds, then all
"""

import hashlib
import http.server
import json
import socket
import struct
import threading
import time
import urllib.parse
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT = (".json", ".jsonl", ".md", ".txt", ".csv")
PAGE = b"<!doctype html><html><title>Welcome</title>Please log in to the network.</html>"
FIRST = ("status", "redirect", "page")  # these faults come before a file is even looked for


@dataclass(frozen=True)
class Fault:
    """What goes wrong with an answer; see the head of this file."""

    kind: str
    at: float = 0
    to: str = ""
    after: str = ""


@dataclass
class Request:
    """One line of the log, in the order of their coming. It says what is sent before that is sent.

    `path` is the path in the data set, or "api"; `n_sent` counts bytes of content.
    """

    method: str
    address: str
    headers: Mapping[str, str]
    path: str = ""
    status: int = 0
    n_sent: int = 0


class FakeHub:
    """The server. `endpoint` and `cdn` are its two addresses, `requests` the log, `commits` {id: commit}."""

    def __init__(
        self,
        files: Mapping[str, Mapping[str, bytes]],
        *,
        cards: Mapping[str, dict[str, Any]] | None = None,
        token: str = "",
        page_size: int = 1000,
    ) -> None:
        self.cards, self.token, self.page_size = dict(cards or {}), token, page_size
        self.commits: dict[str, str] = {}
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._trees: dict[tuple[str, str], dict[str, bytes]] = {}
        self._faults: dict[str, list[Fault | None]] = defaultdict(list)
        self._always: dict[str, Fault] = {}
        self._lock = threading.Lock()
        for name, content in files.items():
            self.put(name, content)

    def put(self, name: str, files: Mapping[str, bytes]) -> str:
        """Commit `files` as the newest content of "owner/name" or "owner/name@branch"; the commit's id."""
        commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        repo, _, branch = name.partition("@")
        for revision in (branch or "main", commit):
            self._trees[repo, revision] = dict(files)
            self.commits[f"{repo}@{revision}"] = commit
        self.commits[name] = commit
        return commit

    def plant(
        self, path: str, kind: str, *, at: float = 0, to: str = "", after: str = "", times: int | None = 1
    ) -> None:
        """Make the next `times` answers for `path` go wrong; None: all that follow."""
        fault = Fault(kind, at, to, after)
        if times is None:
            self._always[path] = fault
        else:
            self._faults[path] += [fault] * times

    def heal(self) -> None:
        """Take all faults away."""
        self._faults.clear()
        self._always.clear()

    def environment(self, cache: Path) -> dict[str, str]:
        """What makes this the hub. Listings of commits are kept in `cache`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": self.token,
            "HF_HOME": str(cache / "hf"),
            "REGPT2_CACHE": str(cache),
        }

    def n_sent(self, path: str) -> int:
        """Bytes of content sent for a path, over all requests."""
        return sum(request.n_sent for request in self.requests if request.path == path)

    def __enter__(self) -> "FakeHub":
        self._servers = [_Server(("127.0.0.1", 0), _Handler) for _ in range(2)]
        for server in self._servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _take(self, path: str, kinds: Iterable[str] | None = None) -> Fault | None:
        """The fault of this answer, if it is one of `kinds`."""
        with self._lock:
            waiting = self._faults[path]
            fault = waiting[0] if waiting else self._always.get(path)
            if fault is None or (kinds is not None and fault.kind not in kinds):
                return None
            if waiting:
                waiting.pop(0)
            return fault


class _Server(http.server.ThreadingHTTPServer):
    hub: FakeHub
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what many tests are about."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.log = Request(self.command, self.path, headers)
        self.server.hub.requests.append(self.log)
        self.answer(self.server.hub, urllib.parse.urlsplit(self.path))

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Silent."""

    def answer(self, hub: FakeHub, url: urllib.parse.SplitResult) -> None:
        words = urllib.parse.unquote(url.path).strip("/").split("/")
        if words[0] == "cdn":
            name = self.log.path = "/".join(words[4:])
            content = hub._trees["/".join(words[1:3]), words[3]][name]
            self.send_file(content, hub._take(name), {"ETag": f'"{_sha256(content)}"'})
            return
        is_api = words[:2] in (["api", "datasets"], ["api", "models"])
        first = 2 if is_api else int(words[0] == "datasets")  # a model's files have no word before their repository
        repo, verb, rest = "/".join(words[first : first + 2]), *_rest(words[first + 2 :])
        rest = rest or "main"
        revision = next((r for (name, r) in hub._trees if name == repo and f"{rest}/".startswith(f"{r}/")), "")
        inside = rest[len(revision) + 1 :]
        self.log.path = "api" if is_api else inside
        if fault := hub._take(self.log.path, None if is_api else FIRST):
            self.fail(fault)
        elif hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.send(401, b"Access is restricted.", {"X-Error-Code": "GatedRepo"})
        elif not revision:
            known = any(name == repo for name, _ in hub._trees)
            self.send(404, b"Not found.", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
        elif is_api and verb == "tree":
            self.send_listing(hub, hub._trees[repo, revision], inside, urllib.parse.parse_qs(url.query))
        elif is_api:
            commit = hub.commits[f"{repo}@{revision}"]
            card = hub.cards.get(repo, {})
            self.send_json({"id": repo, "sha": commit, "gated": bool(hub.token) and "auto", "cardData": card})
        else:
            self.resolve(hub, repo, hub.commits[f"{repo}@{revision}"], inside)

    def resolve(self, hub: FakeHub, repo: str, commit: str, path: str) -> None:
        """As the hub does: a text is sent at once, for anything else one is sent elsewhere."""
        content = hub._trees[repo, commit].get(path)
        if content is None:
            self.send(404, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": commit}
        if path.endswith(TEXT):
            self.send_file(content, hub._take(path), headers | {"ETag": f'"{_blob(content)}"'})
            return
        place = f"{hub.cdn}/cdn/{repo}/{commit}/{urllib.parse.quote(path)}"
        linked = {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content)), "Location": place}
        self.send(302, b"Found. Redirecting.", headers | linked)

    def send_listing(
        self, hub: FakeHub, tree: Mapping[str, bytes], folder: str, query: Mapping[str, list[str]]
    ) -> None:
        """One page; the address of the next is in the header Link."""
        below = [path for path in tree if not folder or path.startswith(f"{folder}/")]
        if folder and not below:
            self.send(404, b"Not found.", {"X-Error-Code": "EntryNotFound"})
            return
        first = int(query.get("cursor", ["0"])[0])
        page = below[first : first + hub.page_size]
        headers = {}
        if first + hub.page_size < len(below):
            address = f"{hub.endpoint}{self.path.split('?')[0]}?recursive=true&cursor={first + hub.page_size}"
            headers["Link"] = f'<{address}>; rel="next"'
        folders = dict.fromkeys(path.rpartition("/")[0] for path in page if "/" in path)
        self.send_json(
            [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders]
            + [_entry(path, tree[path]) for path in page],
            headers,
        )

    def fail(self, fault: Fault) -> None:
        """Faults that need no file."""
        if fault.kind == "status":
            self.send(int(fault.at), b"no", {"Retry-After": fault.after} if fault.after else {})
        elif fault.kind == "redirect":
            self.send(302, b"", {"Location": fault.to or self.path})
        elif fault.kind == "page":
            self.send(200, PAGE, {"Content-Type": "text/html"})
        else:
            self.send_file(b'[{"type": "file"}]' * 100, fault, {"ETag": '"-"', "Content-Type": "application/json"})

    def send_file(self, content: bytes, fault: Fault | None, headers: dict[str, str]) -> None:
        """The stretch that was asked for, or what the fault makes of it."""
        kind, at = (fault.kind, fault.at) if fault else ("", 0)
        if kind in FIRST and fault:
            self.fail(fault)
            return
        if kind == "wrong":
            content = bytes(byte ^ 1 for byte in content)
        elif kind == "grows":
            content += b"x" * int(at)
        first, status = self.first_byte(headers["ETag"]), 206
        if first is None or kind in ("rangeless", "chunked"):
            first, status = 0, 200
        elif first >= len(content):
            self.send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        if status == 206:
            shown = first - 1 if kind == "badrange" else first
            headers["Content-Range"] = f"bytes {shown}-{len(content) - 1}/{len(content)}"
            content = content[shown:]
        self.send_head(status, headers | _length(content, kind))
        if self.command != "HEAD":
            self.send_body(content, kind, at)

    def first_byte(self, etag: str) -> int | None:
        """Of "Range: bytes=N-", if that is asked of this version."""
        asked = self.headers.get("Range", "")
        same = self.headers.get("If-Range", etag) == etag
        return int(asked.removeprefix("bytes=").split("-")[0]) if asked and same else None

    def send_body(self, content: bytes, kind: str, at: float) -> None:
        count = int(at)
        if kind == "slow":
            for start in range(0, len(content), count):
                self.write(content[start : start + count])
                time.sleep(0.01)
        elif kind == "stall":
            self.server.hub.closing.wait(at)
            self.write(content)
        elif kind == "hangs":
            self.write(content[:count])
            self.server.hub.closing.wait()
        elif kind == "short":
            self.write(content[:count])
            self.close_connection = True
        elif kind == "dies":
            self.write(content[:count])
            self.reset()
        elif kind == "chunked":
            self.write(content[:count] if count else content, chunk=True)
            if count:
                self.reset()
            else:
                self.wfile.write(b"0\r\n\r\n")
        else:
            self.write(content)

    def reset(self) -> None:
        """Closed without a goodbye: the other side reads "connection reset"."""
        time.sleep(0.005)  # what was sent before should arrive
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def write(self, data: bytes, chunk: bool = False) -> None:
        """In pieces, so that the log says about how far it got."""
        for start in range(0, len(data), 1 << 16):
            piece = data[start : start + (1 << 16)]
            self.log.n_sent += len(piece)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunk else piece)

    def send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_head(status, {"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_json(self, value: object, headers: Mapping[str, str] | None = None) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send_head(self, status: int, headers: Mapping[str, str]) -> None:
        self.log.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


def _rest(words: list[str]) -> tuple[str, str]:
    return (words[0] if words else ""), "/".join(words[1:])


def _length(content: bytes, kind: str) -> dict[str, str]:
    return {"Transfer-Encoding": "chunked"} if kind == "chunked" else {"Content-Length": str(len(content))}


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as the hub lists it: a large one with what git keeps of it, and what it stands for."""
    if path.endswith(TEXT):
        return {"type": "file", "oid": _blob(content), "size": len(content), "path": path}
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{_sha256(content)}\nsize {len(content)}\n".encode()
    )
    lfs = {"oid": _sha256(content), "size": len(content), "pointerSize": len(pointer)}
    return {"type": "file", "oid": _blob(pointer), "size": len(content), "path": path, "lfs": lfs}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob(content: bytes) -> str:
    """The id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
