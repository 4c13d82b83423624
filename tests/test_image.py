"""deploy/Dockerfile: its steps are carried out here, and its commands run in what they leave (tests/dockerfile.py).

What this leaves unproven: that a builder accepts the file (`make image` asks one, where there is one), what Debian's and
PyTorch's servers send, torch built for CUDA, and a user who is not root.
"""

import json
import re
import signal
import subprocess
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import TINY_RECIPE
from dockerfile import SITE_PACKAGES, Build, BuildFailed, Image, context_files, parse

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "deploy/Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# No command may need the network, and the ranks meet on loopback: `docker run -e NAME=VALUE`.
OFFLINE = {"https_proxy": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
process = (pytest.mark.process, pytest.mark.seconds)


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
        (pod,) = [each["spec"]["template"]["spec"] for each in yaml.safe_load_all(path.read_text()) if "template" in each["spec"]]
        (container,) = pod["containers"]
        context = pod["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (uid, gid, gid), path.name
        assert context["runAsNonRoot"]
        assert container["command"][0] in ("regpt2", "torchrun")
        mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted & {"/data", "/runs"} <= set(only("VOLUME"))
        for port in container.get("ports", []):
            assert str(port["containerPort"]) in only("EXPOSE")


def test_every_package_of_the_image_is_pinned() -> None:
    """`-c constraints.txt` is in every line that installs, and no label names an address that nobody has."""
    text = DOCKERFILE.read_text()
    installs = [step for each in parse(text) if each.name == "RUN" for step in each.rest.split("&&") if "pip install" in step]
    assert len(installs) == 5
    assert all(re.search(r"-c /?constraints\.txt", step) for step in installs)
    assert "://" not in " ".join(only("LABEL"))


def test_the_context_is_the_sources_alone() -> None:
    files = set(context_files(ROOT))
    assert {name for name in files if not name.startswith("src/")} == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE"}
    assert not [name for name in files if name.endswith(".pyc")]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("image")
    try:
        return Build(DOCKERFILE, ROOT, folder)
    except BuildFailed as failure:
        base = Image(folder / "stage-0")
        try:
            base.run("pip", "download", "--no-deps", "-d", str(folder / "probe"), "hatchling")
        except BuildFailed:
            pytest.skip(f"no package registry can be reached: {failure}")
        raise


@pytest.fixture(scope="module")
def image(build: Build) -> Image:
    return build.image
