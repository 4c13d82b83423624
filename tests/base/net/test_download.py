"""Downloads: whatever the network does, the right file or one message; never a wrong or partial one under its name."""

import hashlib
import random
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_server import FakeHub, Request
from regpt2.base.errors import DownloadError, UsageError
from regpt2.base.net import http_client
from regpt2.base.net.download import download, fetch
from regpt2.base.net.http_client import get_json
from regpt2.base.net.hub_settings import hub_endpoint, hub_token, is_offline

pytestmark = pytest.mark.seconds  # all of them together

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
BLOB = hashlib.sha1(b"blob 300000\0" + CONTENT).hexdigest()
NAME = "data/train.parquet"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "PAUSE_S", 0.01)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one file, which it serves by redirect to another address."""
    with FakeHub({"me/texts": {NAME: CONTENT, "small.jsonl": b"{}\n"}}) as it:
        for name, value in it.environment(tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        yield it


def get(hub: FakeHub, path: Path, digest: str = SHA256, **options: object) -> None:
    given = {"n_bytes": len(CONTENT), "digest": digest, "tries": 4} | options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_client, "TIMEOUT_S", 0.2)
        fetch(f"{hub.endpoint}/datasets/me/texts/resolve/main/{NAME}", path, **given)  # type: ignore[arg-type]


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"cache"}


def content_requests(hub: FakeHub) -> list[Request]:
    return [request for request in hub.requests if request.address.startswith("/cdn/")]


# What goes wrong with the answers, one after another: (kind, at) as in hub_server.py. Then all is well.
PASSING: dict[str, list[tuple[str, float]]] = {
    "nothing": [],
    "slow": [("slow", 50_000)],
    "short": [("short", 1000), ("short", 0)],
    "short, without ranges": [("short", 1000), ("rangeless", 0)],
    "dies at once": [("dies", 0)] * 3,
    "dies later each time": [("dies", at) for at in range(10_000, 90_000, 10_000)],
    "dies sooner each time": [("dies", at) for at in range(90_000, 0, -20_000)],
    "dies and then another stretch": [("dies", 10), ("badrange", 0)],
    "stalls": [("stall", 1)],
    "hangs": [("hangs", 70_000), ("hangs", 1)],
    "wrong after a break": [("short", 99), ("wrong", 0)],
    "no length": [("chunked", 0)],
    "no length, dies": [("chunked", 70_000)] * 2,
    "passing statuses": [("status", 500), ("status", 503), ("status", 429)],
    "all at once": [("status", 429), ("dies", 5), ("short", 70_000), ("rangeless", 0)],
}


@pytest.mark.parametrize("digest", [SHA256, BLOB, ""], ids=["sha256", "git", "none"])
@pytest.mark.parametrize("fault", PASSING)
def test_faults_that_pass_end_with_the_right_file(hub: FakeHub, tmp_path: Path, fault: str, digest: str) -> None:
    if fault == "wrong after a break" and not digest:
        pytest.skip("nothing could tell")
    for kind, at in PASSING[fault]:
        hub.plant(NAME, kind, at=at, after="0")
    counts: list[int] = []
    get(hub, tmp_path / "got", digest, on_bytes=counts.append)
    assert (tmp_path / "got").read_bytes() == CONTENT
    assert left(tmp_path) == {"got"}
    assert sum(counts) == len(CONTENT)


# What goes wrong with every answer, and what is said then.
LASTING: dict[str, tuple[dict[str, Any], str]] = {
    "wrong": ({"kind": "wrong"}, f"with SHA-256 [0-9a-f]{{64}}, expected {SHA256}"),
    "grows": ({"kind": "grows", "at": 5}, "has 300,005 bytes, expected 300,000"),
    "page": ({"kind": "page"}, "a page, not the file; does this network want you to log in"),
    "short": ({"kind": "short"}, "closed .* before the end, 4 times in a row"),
    "dies": ({"kind": "dies"}, "4 times in a row"),
    "stall": ({"kind": "stall", "at": 9}, "timed out, 4 times in a row"),
    "500": ({"kind": "status", "at": 500}, "HTTP 500, 4 times in a row"),
    "416": ({"kind": "status", "at": 416}, "HTTP 416"),
    "404": ({"kind": "status", "at": 404}, r"http.* does not exist \(HTTP 404\); check the name"),
    "401": ({"kind": "status", "at": 401}, "gated, private or missing.*HF_TOKEN"),
    "403": ({"kind": "status", "at": 403}, "gated, private or missing.*HF_TOKEN"),
    "loop": ({"kind": "redirect"}, "redirects lead nowhere"),
    "ftp": ({"kind": "redirect", "to": "ftp://127.0.0.1/x"}, "which is not secure"),
    "file": ({"kind": "redirect", "to": "file:///etc/hostname"}, "redirects lead nowhere"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_faults_that_last_end_with_one_message(hub: FakeHub, tmp_path: Path, fault: str) -> None:
    planted, message = LASTING[fault]
    hub.plant(NAME, times=None, **planted)
    with pytest.raises(DownloadError, match=message):
        get(hub, tmp_path / "got")
    assert left(tmp_path) <= {"got.part"}


def test_what_was_there_is_replaced_by_the_right_content_only(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "got").write_bytes(b"former")
    hub.plant(NAME, "wrong")
    with pytest.raises(DownloadError):
        get(hub, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == b"former"
    get(hub, tmp_path / "got")
    n_requests = len(hub.requests)
    get(hub, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == CONTENT
    assert len(hub.requests) == n_requests, "a right file is fetched again"


def test_a_later_call_goes_on_where_the_former_ended(hub: FakeHub, tmp_path: Path) -> None:
    hub.plant(NAME, "short", at=100_000)
    with pytest.raises(DownloadError, match=r"100,000 bytes were kept"):
        get(hub, tmp_path / "got", tries=1)
    get(hub, tmp_path / "got")
    assert hub.n_sent(NAME) == len(CONTENT), "a byte was sent twice"
    assert [request.headers.get("range") for request in content_requests(hub)] == [None, "bytes=100000-"]


def test_a_login_page_does_not_cost_what_has_come(hub: FakeHub, tmp_path: Path) -> None:
    hub.plant(NAME, "short", at=100_000)
    hub.plant(NAME, "page")
    with pytest.raises(DownloadError, match="want you to log in"):
        get(hub, tmp_path / "got")
    get(hub, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == CONTENT
    assert hub.n_sent(NAME) == len(CONTENT)


@pytest.mark.parametrize("damage", [b"", b"x" * 100_000, CONTENT[:-1] + b"x", CONTENT + b"x", CONTENT])
def test_any_file_that_a_former_process_left_is_met(hub: FakeHub, tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "got.part").write_bytes(damage)
    get(hub, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == CONTENT
    assert len(content_requests(hub)) == {CONTENT: 0, b"x" * 100_000: 2}.get(damage, 1)


def test_without_a_digest_nothing_of_a_former_process_is_trusted(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "got.part").write_bytes(b"x" * 1000)
    get(hub, tmp_path / "got", digest="")
    assert (tmp_path / "got").read_bytes() == CONTENT
    hub.plant(NAME, "short", at=1000)
    with pytest.raises(DownloadError):
        get(hub, tmp_path / "other", digest="", tries=1)
    assert left(tmp_path) == {"got"}


def test_a_file_that_changes_on_the_way_starts_over(tmp_path: Path, hub: FakeHub) -> None:
    """Without a digest, If-Range asks for the rest of the same version only."""
    hub.plant("small.jsonl", "short", at=2)
    url = f"{hub.endpoint}/datasets/me/texts/resolve/main/small.jsonl"
    changed: list[int] = []

    def change(count: int) -> None:
        if not changed:
            hub.put("me/texts", {"small.jsonl": b"[1]\n"})
        changed.append(count)

    fetch(url, tmp_path / "got", on_bytes=change)
    assert (tmp_path / "got").read_bytes() == b"[1]\n"
    assert changed == [2, -2, 4]


def test_another_stretch_than_asked_for_is_refused_if_nothing_else_could_tell(hub: FakeHub, tmp_path: Path) -> None:
    hub.plant(NAME, "short", at=1000)
    hub.plant(NAME, "badrange")
    get(hub, tmp_path / "got", digest="", n_bytes=None)
    assert (tmp_path / "got").read_bytes() == CONTENT


def test_progress_wins_over_any_number_of_breaks(hub: FakeHub, tmp_path: Path) -> None:
    for _ in range(30):
        hub.plant(NAME, "dies", at=9000)
    get(hub, tmp_path / "got", tries=2)
    assert (tmp_path / "got").read_bytes() == CONTENT


def test_a_server_without_ranges_that_always_breaks_is_given_up(hub: FakeHub, tmp_path: Path) -> None:
    """The same bytes again are no progress."""
    hub.plant(NAME, "chunked", at=1000, times=None)
    with pytest.raises(DownloadError, match="4 times in a row"):
        get(hub, tmp_path / "got")
    assert hub.n_sent(NAME) < 10_000


CHILD = """
import sys
from pathlib import Path
from regpt2.base.net.download import fetch
fetch(sys.argv[1], Path(sys.argv[2]), n_bytes=int(sys.argv[3]), digest=sys.argv[4])
"""


def child(hub: FakeHub, path: Path, before: str = "") -> "subprocess.Popen[str]":
    url = f"{hub.endpoint}/datasets/me/texts/resolve/main/{NAME}"
    command = [sys.executable, "-c", before + CHILD, url, str(path), str(len(CONTENT)), SHA256]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(hub: FakeHub, tmp_path: Path) -> None:
    hub.plant(NAME, "slow", at=3000, times=None)  # about a second for all of it
    chance, kills = random.Random(0), 0
    while not (tmp_path / "got").exists():
        process = child(hub, tmp_path / "got")
        before, deadline = part_bytes(tmp_path), time.monotonic() + 20
        while part_bytes(tmp_path) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        if kills < 5:
            time.sleep(chance.uniform(0.0, 0.2))
            process.kill()
        assert process.communicate(timeout=20)[1] == ""
        kills += process.returncode != 0
    assert (tmp_path / "got").read_bytes() == CONTENT
    assert left(tmp_path) == {"got"}
    assert kills
    ranges = [request.headers.get("range") for request in content_requests(hub)]
    assert len(ranges) == kills + 1 and ranges[0] is None and None not in ranges[1:]


def part_bytes(folder: Path) -> int:
    part = folder / "got.part"
    return part.stat().st_size if part.exists() else 0


def test_two_processes_fetch_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.plant(NAME, "slow", at=10_000, times=None)
    both = [child(hub, tmp_path / "got") for _ in range(2)]
    for process in both:
        assert process.communicate(timeout=20)[1] == "" and process.returncode == 0
    assert (tmp_path / "got").read_bytes() == CONTENT
    assert hub.n_sent(NAME) == len(CONTENT)
    assert left(tmp_path) == {"got"}


def test_four_threads_on_one_file_do_not_mix(hub: FakeHub, tmp_path: Path) -> None:
    hub.plant(NAME, "dies", at=50_000, times=3)
    threads = [threading.Thread(target=get, args=(hub, tmp_path / "got")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "got").read_bytes() == CONTENT
    assert left(tmp_path) == {"got"}


def test_the_token_goes_to_the_hub_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeHub({"me/texts": {NAME: CONTENT}}, token="hf_secret") as hub:
        for name, value in hub.environment(tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        get(hub, tmp_path / "got")
        asked, sent = hub.requests
        assert asked.headers["authorization"] == "Bearer hf_secret" and asked.status == 302
        assert sent.address.startswith("/cdn/") and "authorization" not in sent.headers
        fetch(hub.cdn + sent.address, tmp_path / "direct", digest=SHA256)
        assert "authorization" not in hub.requests[-1].headers
        monkeypatch.setenv("HF_TOKEN", "other")
        with pytest.raises(DownloadError, match="HF_TOKEN"):
            get(hub, tmp_path / "third")


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
"""


def test_a_disk_that_takes_no_more_keeps_what_has_come(hub: FakeHub, tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="Windows has no limit on the size of files")
    said = child(hub, tmp_path / "got", FULL).communicate(timeout=20)[1]
    assert "OSError" in said and "File too large" in said
    assert left(tmp_path) == {"got.part"} and part_bytes(tmp_path) == 100_000
    get(hub, tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == CONTENT
    assert content_requests(hub)[-1].headers["range"] == "bytes=100000-"


def test_offline_nothing_is_asked_of_the_hub(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unused_port: int
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        get(hub, tmp_path / "got")
    assert not hub.requests
    with pytest.raises(DownloadError, match=r"refused.*check the network"):
        fetch(f"http://127.0.0.1:{unused_port}/x", tmp_path / "got", tries=2)
    with pytest.raises(DownloadError, match=r"begins with https://"):
        fetch("file:///etc/hostname", tmp_path / "got")


def test_a_server_is_not_asked_sooner_than_it_wants(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(http_client.time, "sleep", slept.append)
    monkeypatch.setattr(http_client, "PAUSE_S", 0.5)
    hub.plant("api", "status", at=429, after="7")
    hub.plant("api", "status", at=503, after="99999")
    hub.plant("api", "status", at=500)
    assert get_json(f"{hub.endpoint}/api/datasets/me/texts")[0]["id"] == "me/texts"
    assert slept[0] == 7 and slept[1] == http_client.LONGEST_PAUSE_S and 1 <= slept[2] <= 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("page", "does not answer with JSON.*log in"),
        ("short", "closed .* before the end"),
        ("dies", "in a row"),
        ("slow", "more than 1,000 bytes"),
        ("redirect", "redirects lead nowhere"),
    ],
)
def test_a_small_answer_is_json_or_one_message(hub: FakeHub, kind: str, message: str) -> None:
    hub.plant("api", kind, at=500, times=None)
    with pytest.raises(DownloadError, match=message):
        get_json(f"{hub.endpoint}/api/datasets/me/texts", most_bytes=1000, tries=2)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for 127.0.0.1 with its key."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run(
            [*command.split(), *names, "-keyout", f"{path}.key", "-out", f"{path}.crt"], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl here")
    path.write_text(Path(f"{path}.key").read_text() + Path(f"{path}.crt").read_text())
    return path


def test_https_is_verified_and_never_left(
    hub: FakeHub, tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = hub._servers[0]
    server.socket = context.wrap_socket(server.socket, server_side=True)
    hub.endpoint = hub.endpoint.replace("http:", "https:")
    with pytest.raises(DownloadError, match=r"certificate is not valid.*SSL_CERT_FILE"):
        get(hub, tmp_path / "got")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with pytest.raises(DownloadError, match=r"redirects to http://.*not secure"):
        get(hub, tmp_path / "got")
    fetch(f"{hub.endpoint}/datasets/me/texts/resolve/main/small.jsonl", tmp_path / "small")
    assert (tmp_path / "small").read_bytes() == b"{}\n"


def test_a_pinned_download_is_what_was_pinned_or_an_error(hub: FakeHub, tmp_path: Path) -> None:
    url = f"{hub.endpoint}/datasets/me/texts/resolve/main/{NAME}"
    download(url, tmp_path / "got", SHA256)
    assert (tmp_path / "got").read_bytes() == CONTENT
    hub.plant(NAME, "wrong", times=None)
    download(url, tmp_path / "got", SHA256)  # what is there already is kept, and right
    with pytest.raises(DownloadError, match=r"gave 300,000 bytes with SHA-256 .* expected .*put the file at"):
        download(url, tmp_path / "other", SHA256)
    with pytest.raises(DownloadError, match=r"404.*put the file at"):
        download(f"{url}.no", tmp_path / "other", SHA256)
    assert left(tmp_path) == {"got"}


def test_the_settings_are_those_of_the_hubs_own_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for name in ("HF_ENDPOINT", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert (hub_endpoint(), hub_token(), is_offline()) == ("https://huggingface.co", "", False)
    (tmp_path / "token").write_text("hf_kept\n")
    assert hub_token() == "hf_kept"
    (tmp_path / "token").write_bytes(b"hf_\xff")
    with pytest.raises(UsageError, match=r"cannot read the token.*set HF_TOKEN"):
        hub_token()
    monkeypatch.setenv("HF_TOKEN", "hf_set")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    monkeypatch.setenv("HF_HUB_OFFLINE", "true")
    assert (hub_endpoint(), hub_token(), is_offline()) == ("https://mirror.example", "hf_set", True)
    for odd in ("a\x1b[2J", "hf_é"):
        monkeypatch.setenv("HF_TOKEN", odd)
        with pytest.raises(UsageError, match="HF_TOKEN"):
            hub_token()
    monkeypatch.setenv("HF_TOKEN", "a\r\nX-Evil: 1")
    assert hub_token() == "aX-Evil: 1", "no second header"
    monkeypatch.setenv("HF_ENDPOINT", "mirror.example")
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        hub_endpoint()


def test_a_wait_is_a_number_or_a_date() -> None:
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert (
        http_client._wait_s("12") == 12
        and 55 < http_client._wait_s(later) <= 60
        and http_client._wait_s("soon") == http_client._wait_s("") == 0
    )
