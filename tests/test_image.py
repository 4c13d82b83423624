"""deploy/Dockerfile: its steps are carried out here, and its commands run in what they leave (tests/dockerfile.py).

What this leaves unproven: that a builder accepts the file (`make image` asks one, where there is one), what Debian's
and PyTorch's servers send, torch built for CUDA, and a user who is not root.
"""

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from conftest import TINY_RECIPE
from dockerfile import SITE_PACKAGES, Build, BuildFailed, Image, context_files, parse
from test_deploy import children, events, kill_hard

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "deploy/Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# No command may need the network, and the ranks meet on loopback: `docker run -e NAME=VALUE`.
OFFLINE = {"https_proxy": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
RECIPE = TINY_RECIPE.replace("vocab_size = 257", "vocab_size = 50257").replace("max_steps = 12", "max_steps = 5000")


def only(name: str) -> list[str]:
    """The words of the last instruction of this name."""
    return [each for each in parse(DOCKERFILE.read_text()) if each.name == name][-1].words


def test_the_command_is_process_1_and_no_shell_is_before_it() -> None:
    commands = [each for each in parse(DOCKERFILE.read_text()) if each.name in ("CMD", "ENTRYPOINT", "VOLUME")]
    assert [each.name for each in commands] == ["VOLUME", "CMD"]
    assert all(each.is_exec_form for each in commands)
    assert only("CMD") == ["regpt2", "--help"]


def test_the_manifests_use_what_the_image_has() -> None:
    uid, gid = map(int, only("USER")[0].split(":"))
    assert uid > 0
    for path in sorted((ROOT / "deploy").glob("*.yaml")):
        (pod,) = [
            each["spec"]["template"]["spec"]
            for each in yaml.safe_load_all(path.read_text())
            if "template" in each["spec"]
        ]
        (container,) = pod["containers"]
        context = pod["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (uid, gid, gid), path.name
        assert context["runAsNonRoot"]
        assert container["command"][0] in ("regpt2", "torchrun")
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted & {"/data", "/runs"} <= set(only("VOLUME"))
        for port in container.get("ports", []):
            assert str(port["containerPort"]) in only("EXPOSE")


def test_the_parts_of_the_serving_manifest_fit_together() -> None:
    text = (ROOT / "deploy/kubernetes-serve.yaml").read_text()
    service, deployment = yaml.safe_load_all(text)
    pod = deployment["spec"]["template"]
    (server,) = pod["spec"]["containers"]
    options = dict(word.split("=", 1) for word in server["command"] if word.startswith("--"))
    # the Service finds the pods, at the port where the server listens
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    (port,) = server["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"] == server["readinessProbe"]["httpGet"]["port"]
    assert int(options["--port"]) == port["containerPort"]
    # the key lies where the server reads it, under the name that the command above makes
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in server["volumeMounts"]}
    folder, key = options["--api-key-file"].rsplit("/", 1)
    secret = mounts[folder]["secret"]
    assert f"kubectl create secret generic {secret['secretName']} --from-literal={key}=" in text
    assert secret["defaultMode"] & 0o777 == 0o440  # its group is the pod's fsGroup
    # requests under way may finish before Kubernetes kills the process
    leaving_s = server["lifecycle"]["preStop"]["sleep"]["seconds"] + float(options["--drain-s"])
    assert leaving_s + 10 <= pod["spec"]["terminationGracePeriodSeconds"]


def test_every_package_of_the_image_is_pinned() -> None:
    """`-c constraints.txt` is in every line that installs, and no label names an address that nobody has."""
    text = DOCKERFILE.read_text()
    installs = [
        step for each in parse(text) if each.name == "RUN" for step in each.rest.split("&&") if "pip install" in step
    ]
    assert len(installs) == 5
    assert all(re.search(r"-c /?constraints\.txt", step) for step in installs)
    assert "://" not in " ".join(only("LABEL"))


def test_the_context_is_the_sources_alone() -> None:
    files = set(context_files(ROOT))
    assert {name for name in files if not name.startswith("src/")} == {
        "constraints.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    }
    assert not [name for name in files if name.endswith(".pyc")]


# What the steps leave


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    if sys.platform != "linux":
        pytest.skip("the steps use Linux's tools")
    folder = tmp_path_factory.mktemp("image")
    try:
        return Build(DOCKERFILE, ROOT, folder)
    except BuildFailed as failure:
        try:
            Image(folder / "stage-0").run("pip", "download", "--no-deps", "--dest", "/probe", "hatchling")
        except BuildFailed:
            pytest.skip(f"no package registry can be reached: {failure}")
        raise


@pytest.fixture(scope="module")
def image(build: Build) -> Image:
    return build.image


@pytest.mark.seconds
def test_the_image_holds_the_whole_package_and_what_it_needs_in_pinned_versions(image: Image) -> None:
    source, installed = ROOT / "src/regpt2", image.root / SITE_PACKAGES / "regpt2"
    files = {
        path.relative_to(source) for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert {path.relative_to(installed) for path in installed.rglob("*")} >= files
    assert image.run("regpt2", "--version").split() == ["regpt2", PROJECT["version"]]
    assert "does not provide the extra" not in image.output  # pip only warns
    pins = {plain(pin.partition("==")[0]) for pin in (ROOT / "constraints.txt").read_text().splitlines() if "==" in pin}
    needed = {plain(name) for name in re.findall(r"(?:already satisfied: |Collecting )([\w.-]+)", image.output)}
    assert len(needed) > 50
    assert needed <= pins
    for mode in (image.place(path).stat().st_mode for path in (*only("VOLUME"), image.environment["HOME"])):
        assert mode & 0o7777 == 0o1777  # any user may write there


def plain(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name.lower())


@pytest.mark.seconds
def test_the_packages_of_debian_exist(image: Image) -> None:
    asked = [line.split() for line in (image.root / "stand-ins/log").read_text().splitlines()]
    packages = [word for line in asked if line[:2] == ["apt-get", "install"] for word in line[2:] if word[0] != "-"]
    assert packages == ["g++"]
    if shutil.which("apt-cache"):
        subprocess.run(["apt-cache", "show", *packages], check=True, capture_output=True, timeout=60)
    assert ["useradd", "--uid", only("USER")[0].split(":")[0], "--create-home", "regpt2"] in asked


@contextmanager
def container(image: Image, words: list[str]) -> Iterator[tuple["subprocess.Popen[bytes]", int, Path]]:
    """`docker run IMAGE WORDS`: the process, its number as the host sees it, and what it prints.

    It is process 1 of a namespace where that is allowed: there a signal without a handler has no effect.
    """
    log, prefix = image.root / "log", namespace()
    with open(log, "wb") as output:
        started = subprocess.Popen(
            [*prefix, *(image.rewritten(word) for word in words)],
            cwd=image.place(""),
            env={**image.variables(), **OFFLINE},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        if prefix:
            wait_until(lambda: bool(children(started.pid)), started, log)
        yield started, children(started.pid)[0] if prefix else started.pid, log
    finally:
        if started.poll() is None:
            kill_hard(started)


def namespace() -> list[str]:
    """How to start a process as process 1; nothing where it is not allowed."""
    for user in ([], ["--user", "--map-root-user"]):
        command = ["unshare", *user, "--pid", "--fork", "--mount-proc"]
        if (
            shutil.which("unshare")
            and not subprocess.run([*command, "true"], capture_output=True, check=False).returncode
        ):
            return command
    return []


def wait_until(
    condition: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path, timeout_s: float = 90
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def trained(image: Image) -> Path:
    """A run of two ranks, stopped by SIGTERM to the image's torchrun."""
    text = "\n".join(f"The number {i} is followed by {i + 1}, and {i * i} is its square." for i in range(3000))
    image.place("/data/text.txt").write_text(text)
    image.place("/data/tiny.toml").write_text(RECIPE)
    image.run("regpt2", "prepare", "text_files", "--input", "/data/text.txt", "--out", "/data/text", **OFFLINE)
    command = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "regpt2", "--", "train", "/data/tiny.toml"]
    run = image.place("/runs/tiny")
    with container(image, [*command, "--data=/data/text", "--run=/runs/tiny"]) as (torchrun, pid, log):
        wait_until(lambda: any(event["step"] >= 4 for event in events(run, "train")), torchrun, log)
        os.kill(pid, signal.SIGTERM)
        torchrun.wait(60)
    return run


@pytest.mark.seconds
def test_two_ranks_train_on_text_of_gpt2_s_tokens_without_a_network_and_stop_together(
    image: Image, trained: Path
) -> None:
    """GPT-2's vocabulary is in the image. Its torchrun passes the signal of `docker stop` on to the ranks."""
    manifest = json.loads(next(image.place("/data/text").glob("*.json")).read_text())
    assert manifest["tokenizer"] == "gpt2"
    end = events(trained, "end")[-1]
    assert end["reason"] == "stopped by signal 15"
    assert events(trained, "run")[-1]["world_size"] == 2
    assert (trained / "checkpoints" / f"step-{end['step']:08d}" / "model.safetensors").exists()


@pytest.mark.seconds
def test_the_manifest_s_server_asks_for_the_key_answers_by_the_service_s_name_and_stops_on_sigterm(
    image: Image, trained: Path, unused_port: int
) -> None:
    """deploy/kubernetes-serve.yaml as it is, but for the model, the address and the port."""
    service, deployment = yaml.safe_load_all((ROOT / "deploy/kubernetes-serve.yaml").read_text())
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    own = {
        "/runs/gpt2_124m": "/runs/tiny",
        "--host=0.0.0.0": "--host=127.0.0.1",
        "--port=8000": f"--port={unused_port}",
    }
    assert own.keys() <= set(server["command"])
    image.place("/secrets").mkdir()
    image.place("/secrets/api-key").write_text("k" * 64)
    health, name = server["readinessProbe"]["httpGet"]["path"], service["metadata"]["name"]

    def status(method: str, path: str, **headers: str) -> int:
        body = json.dumps({"model": "tiny", "prompt": "The number 1", "max_tokens": 2}) if method == "POST" else None
        connection = http.client.HTTPConnection("127.0.0.1", unused_port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", **headers})
            return connection.getresponse().status
        except ConnectionRefusedError:
            return 0
        finally:
            connection.close()

    with container(image, [own.get(word, word) for word in server["command"]]) as (process, pid, log):
        wait_until(lambda: status("GET", health) == 200, process, log)
        assert status("POST", "/v1/completions") == 401
        key = {"Authorization": f"Bearer {'k' * 64}"}
        # Clients in the cluster use port 80, so Host is the name alone.
        assert status("POST", "/v1/completions", Host=name, **key) == 200
        assert status("POST", "/v1/completions", Host="another", **key) == 421
        os.kill(pid, signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
