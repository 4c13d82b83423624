"""The options of serve: nonsense is refused in one line with exit code 2, before a model is read."""

import socket
import subprocess
from pathlib import Path

import pytest

from regpt2.base.errors import UsageError
from regpt2.base.options import parse
from regpt2.serving.http.server import access_of
from regpt2.serving.options import ServeOptions

KEY = "0123456789abcdef"
NONSENSE = [
    ["--port", "-1"],
    ["--port", "65536"],
    ["--slots", "0"],
    ["--slots", "-3"],
    ["--queue", "0"],
    ["--queue", "1000001"],
    ["--context", "0"],
    ["--connections", "0"],
    ["--body-kb", "0"],
    ["--body-kb", "99999999"],
    ["--timeout-s", "0"],
    ["--timeout-s", "-1"],
    ["--timeout-s", "nan"],
    ["--timeout-s", "inf"],
    ["--drain-s", "-1"],
    ["--drain-s", "nan"],
    ["--host", ""],
    ["--host", "127.0.0.1:8000"],
    ["--host", "http://localhost"],
    ["--host", "a b"],
    ["--host", "0.0.0.0"],
    ["--host", "::"],
    ["--host", "192.168.1.5"],
    ["--host", "my-machine"],
    ["--allow-host", "*"],
    ["--allow-host", "https://gpt.example.org"],
    ["--allow-host", "gpt.example.org/x"],
    ["--allow-origin", "*"],
    ["--allow-origin", "null"],
    ["--allow-origin", "gpt.example.org"],
    ["--allow-origin", "https://gpt.example.org/"],
    ["--allow-origin", "https://GPT.example.org"],
    ["--api-key-file", "missing"],
]


@pytest.mark.parametrize("options", NONSENSE, ids=" ".join)
def test_nonsense_is_refused_in_one_line(regpt2: "object", options: list[str]) -> None:
    done: subprocess.CompletedProcess[str] = regpt2("serve", "no-model", *options)  # type: ignore[operator]
    assert done.returncode == 2
    assert done.stderr.startswith("regpt2: ") and done.stderr.count("\n") == 1
    assert options[0] in done.stderr and "no-model" not in done.stderr and done.stdout == ""


def test_a_port_that_is_no_number_and_an_unknown_option_are_refused(regpt2: "object") -> None:
    for options in (["--port", "http"], ["--prot", "1"], ["--open=maybe"]):
        done = regpt2("serve", "no-model", *options)  # type: ignore[operator]
        assert done.returncode == 2 and "Traceback" not in done.stderr


def test_all_options_that_make_sense_are_taken() -> None:
    more = ["--allow-host", "a.example", "--allow-host", "b.example:81", "--allow-origin", "https://c.example:8443"]
    options = parse(ServeOptions, ["m", "n", "--port", "0", "--host", "LocalHost", "--open", *more], "serve")
    options.check()
    assert options.models == ("m", "n") and options.open
    assert options.allow_host == ("a.example", "b.example:81") and options.allow_origin == ("https://c.example:8443",)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_s_own_addresses_need_no_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REGPT2_API_KEY", raising=False)
    access = access_of(ServeOptions(("m",), host=host))
    assert access.key is None and access.names == ()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "my-machine", "localhost.example.org"])
def test_other_addresses_need_a_key_and_take_it(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGPT2_API_KEY", "")
    with pytest.raises(UsageError, match="needs an API key: --api-key-file FILE, or REGPT2_API_KEY"):
        access_of(ServeOptions(("m",), host=host))
    (tmp_path / "key").write_text(KEY + "\n")
    access = access_of(ServeOptions(("m",), host=host, api_key_file=tmp_path / "key", allow_host=("a.example",)))
    assert access.key == KEY
    assert access.names == ("a.example", socket.gethostname().lower()), "others know this machine by its own name"
    monkeypatch.setenv("REGPT2_API_KEY", "x" * 20)
    assert access_of(ServeOptions(("m",), host=host)).key == "x" * 20
    assert access_of(ServeOptions(("m",))).key == "x" * 20, "a key that is given is asked for here too"
