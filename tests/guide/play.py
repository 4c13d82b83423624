"""A chapter played. In: a chapter; out: what each block printed and drew, in a folder of its own."""

import ast
import contextlib
import io
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chapter import Block, Chapter

BLOCK_S = 120
"""A command that takes longer is stopped."""
COLUMNS = "100"
LOOK = {"figure.figsize": (6.4, 3.4), "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
LOOK |= {"grid.alpha": 0.3, "legend.frameon": False, "font.size": 9}


@dataclass
class Played:
    """What came of a chapter."""

    outputs: dict[int, str] = field(default_factory=dict)
    """By the line number of the block that printed it."""
    pictures: dict[str, bytes] = field(default_factory=dict)
    """PNG by its path relative to the guide."""
    problems: list[str] = field(default_factory=list)


def play(chapter: Chapter, folder: Path) -> Played:
    """Runs every block, with `folder` as the current directory; stops at the first block that fails unasked."""
    played = Played()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with _within(folder):
        for block in chapter.blocks:
            place = f"{chapter.path.name}:{block.number}"
            if block.kind == "picture":
                png = _figure(namespace.pop("_", None))
                if png is None:
                    played.problems.append(f"{place}: the block above has drawn nothing")
                    return played
                played.pictures[block.picture] = png
            if block.kind == "file":
                Path(str(block.mark("write"))).write_text(block.body + "\n")
            if block.kind not in ("python", "bash"):
                continue
            run = _python if block.kind == "python" else _bash
            printed, error = run(block, place, namespace)
            printed, error = _without(folder, printed), error and _without(folder, error)
            if (error is None) == (block.mark("fails") is not None):
                problem = error or "expected an error, and none came"
                played.problems.append(f"{place}: {problem}\n{printed[-2000:]}")
                return played
            played.outputs[block.number] = printed + (error.strip().split("\n")[-1] + "\n" if error else "")
    return played


def _without(folder: Path, text: str) -> str:
    """The text as a reader in the folder would see it."""
    return text.replace(f"{folder.resolve()}/", "").replace(str(folder.resolve()), ".")


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[None]:
    """In `folder`, with the commands of this Python first on the path and pictures kept off the screen."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update(LOOK)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ |= {"COLUMNS": COLUMNS, "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    with contextlib.chdir(folder):
        yield


def _python(block: Block, place: str, namespace: dict[str, Any]) -> tuple[str, str | None]:
    """What the code printed, and its error."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            tree = ast.parse("\n" * block.number + block.body, place)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, place, "exec"), namespace)
            if isinstance(last, ast.Expr):  # as a notebook, which shows the value of the last line
                namespace["_"] = eval(compile(ast.Expression(last.value), place, "eval"), namespace)
        except Exception:
            return printed.getvalue(), traceback.format_exc()
    return printed.getvalue(), None


def _bash(block: Block, place: str, namespace: dict[str, Any]) -> tuple[str, str | None]:
    """What the commands printed on standard output, and on standard error if they failed."""
    command = ["bash", "-e", "-c", block.body]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BLOCK_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return "", f"ran longer than {BLOCK_S} s"
    return done.stdout, (done.stderr or f"exit {done.returncode}") if done.returncode else None


def _figure(value: object) -> bytes | None:
    """The figure that `value` is, or else pyplot's, as a PNG; None if it is empty. Closes all."""
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    figure = value if isinstance(value, Figure) else pyplot.gcf()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close("all")
    return out.getvalue() if figure.axes else None
