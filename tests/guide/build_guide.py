"""Builds the guide: runs each chapter, compares, quotes, draws, writes notebooks.

    python tests/guide/build_guide.py [--only WORD] [--accept] [--jobs 2]

What a chapter printed must be what its page says, within the tolerance that the page states; `--accept` writes what
came into the page instead. Quoted code, pictures and notebooks are always written anew. A picture is kept if what
was drawn looks the same. Two notebooks are then run as Jupyter runs them. Exit code 1 if anything differs.
"""

import argparse
import io
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # chapters run side by side
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from agree import difference
from chapter import FOLDER, Block, Chapter, chapters, read_chapter
from notebook import notebook
from play import BLOCK_S, Played, play
from quote import quote

AS_NOTEBOOKS = ("07_batches", "14_ranks")
"""Chapters whose notebooks are run too: commands and code, in seconds."""
SAME_PICTURE = 0.004
"""Mean difference of two pictures' pixels, of 1, up to which they look the same."""


@dataclass(frozen=True)
class Built:
    """How a chapter came out."""

    name: str
    problems: tuple[str, ...]
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="chapters whose file name contains this")
    parser.add_argument("--accept", action="store_true", help="write what came into the pages")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    paths = [path for path in chapters() if options.only in path.name]
    if not paths:
        parser.error(
            f"--only {options.only}: no chapter's file name contains it: {', '.join(p.name for p in chapters())}"
        )
    started_at = time.perf_counter()
    found = 0
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        for built in pool.imap(partial(build, accept=options.accept), paths):
            print(f"{'ok  ' if not built.problems else 'FAIL'} {built.name} ({built.seconds:.1f} s)", flush=True)
            for problem in built.problems:
                print(f"     {problem}", flush=True)
            found += bool(built.problems)
    for path in (path for path in paths if path.stem in AS_NOTEBOOKS):
        problem = run_notebook(path.with_suffix(".ipynb"))
        print(
            f"FAIL {path.stem} as a notebook\n     {problem}" if problem else f"ok   {path.stem} as a notebook",
            flush=True,
        )
        found += bool(problem)
    print(f"guide: {len(paths)} chapters, {found} with differences, {time.perf_counter() - started_at:.0f} s")
    return 1 if found else 0


def build(path: Path, accept: bool) -> Built:
    """One chapter, in a process and a folder of its own."""
    started_at = time.perf_counter()
    chapter = quoted(read_chapter(path))
    with tempfile.TemporaryDirectory(prefix=f"{chapter.name}-") as folder:
        played = play(chapter, Path(folder))
    problems = played.problems
    if accept and not problems:
        chapter = with_outputs(chapter, played)
    elif not problems:
        problems = differences(chapter, played)
    path.write_text(chapter.text())
    if not played.problems:
        keep_pictures(played)
    path.with_suffix(".ipynb").write_text(notebook(chapter))
    return Built(chapter.name, tuple(problems), time.perf_counter() - started_at)


def run_notebook(path: Path) -> str | None:
    """What went wrong in a kernel of its own; None if nothing did."""
    import nbclient
    import nbformat

    book = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        try:
            nbclient.NotebookClient(book, timeout=BLOCK_S, kernel_name="python3", resources=where).execute()
        except nbclient.exceptions.CellExecutionError as error:
            return str(error)[-2000:]
    printed = [out.get("text", "") for cell in book.cells for out in cell.get("outputs", [])]
    return next((text for text in printed if "regpt2: " in text or "not found" in text), None)


def quoted(chapter: Chapter) -> Chapter:
    """The chapter with its quotations as the source is today."""
    blocks = [
        block.with_body(quote(place)) if (place := block.mark("source")) is not None else block
        for block in chapter.blocks
    ]
    return replace(chapter, blocks=tuple(blocks))


def outputs_of(chapter: Chapter) -> list[tuple[Block, Block | None]]:
    """Each block that runs, with the block of its output below, if it has one."""
    shown = [block for block in chapter.blocks if block.kind in ("python", "bash", "output")]
    below = [*shown[1:], None]
    return [
        (block, after if after is not None and after.kind == "output" else None)
        for block, after in zip(shown, below, strict=True)
        if block.kind != "output"
    ]


def differences(chapter: Chapter, played: Played) -> list[str]:
    """What was printed and does not agree with the page."""
    problems = []
    for block, output in outputs_of(chapter):
        place, printed = f"{chapter.path.name}:{block.number}", played.outputs[block.number]
        if output is None:
            if printed.strip():
                problems.append(f"{place}: printed, and the page shows no output: {printed.strip().splitlines()[0]!r}")
            continue
        share = float((output.mark("within") or "0").rstrip("%")) / 100
        if output.mark("varies") is not None:
            problem = None if printed.strip() and output.body.strip() else "expected some output, got none"
        else:
            problem = difference(output.body, printed, share)
        if problem:
            problems.append(f"{place}: {problem}")
    return problems


def with_outputs(chapter: Chapter, played: Played) -> Chapter:
    """The chapter with what came where the page said something else, or what varies; more output gets a block."""
    wrong = {problem.split(": ")[0] for problem in differences(chapter, played)}
    new: dict[int, Block] = {}
    added: dict[int, Block] = {}
    for block, output in outputs_of(chapter):
        varies = output is not None and output.mark("varies") is not None
        if f"{chapter.path.name}:{block.number}" not in wrong and not varies:
            continue
        body = "\n".join(line.rstrip() for line in played.outputs[block.number].strip("\n").split("\n"))
        if output is None:
            added[block.number] = Block("output", ("", "```text", *body.split("\n"), "```"), block.number)
        else:
            new[output.number] = output.with_body(body)
    blocks = []
    for block in chapter.blocks:
        blocks.append(new.get(block.number, block))
        if block.number in added:
            blocks.append(added[block.number])
    return replace(chapter, blocks=tuple(blocks))


def keep_pictures(played: Played) -> None:
    """Writes each picture that looks other than the one that is there."""
    for name, png in played.pictures.items():
        path = FOLDER / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or not same_picture(path.read_bytes(), png):
            path.write_bytes(png)


def same_picture(one: bytes, other: bytes) -> bool:
    """Do two PNG look the same?"""
    from matplotlib.image import imread

    a, b = (imread(io.BytesIO(png), format="png") for png in (one, other))
    near = abs(a.shape[0] - b.shape[0]) + abs(a.shape[1] - b.shape[1]) <= 6  # labels of another width move the edges
    height, width = min(a.shape[0], b.shape[0]), min(a.shape[1], b.shape[1])
    return near and float(np.abs(a[:height, :width] - b[:height, :width]).mean()) < SAME_PICTURE


if __name__ == "__main__":
    raise SystemExit(main())
