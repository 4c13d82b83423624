"""A chapter as a notebook. In: a chapter; out: the text of an .ipynb, without outputs, the same each time."""

import re

import jupytext
import nbformat
from chapter import Block, Chapter

FIRST = """\
import os
import sys

os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]  # the commands of this Python
try:
    import regpt2
except ModuleNotFoundError:  # on Colab, say
    source = input("The address of regpt2's repository, or of a wheel of it: ")
    %pip install --quiet {source if source.endswith(".whl") else "git+" + source}"""


def notebook(chapter: Chapter) -> str:
    """Text and code as cells; what the code printed is left out, because running it shows it."""
    cells = []
    text: list[str] = []
    for block in chapter.blocks:
        if block.kind == "output" or (block.kind == "picture"):
            continue
        if block.kind in ("python", "bash", "file"):
            cells += _markdown(text)
            text = []
            cells.append(nbformat.v4.new_code_cell(_code(block)))
        else:
            text += block.lines
    cells += _markdown(text)
    first = nbformat.v4.new_code_cell(FIRST)
    cells.insert(1 if cells and cells[0].cell_type == "markdown" else 0, first)
    for number, cell in enumerate(cells):
        cell.id = f"{chapter.name}-{number}"
    book = nbformat.v4.new_notebook(cells=cells)
    book.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return jupytext.writes(book, fmt="ipynb") + "\n"


def _markdown(lines: list[str]) -> list[nbformat.NotebookNode]:
    """A cell of text, without the comments that only the build reads."""
    kept = "\n".join(line for line in lines if not line.startswith("<!-- "))
    kept = re.sub(r"\n{3,}", "\n\n", kept).strip("\n")
    return [nbformat.v4.new_markdown_cell(kept)] if kept else []


def _code(block: Block) -> str:
    """Python as it is; commands as one script, because a later one may use what an earlier one has set."""
    head = {"bash": "%%bash -e\n", "file": f"%%writefile {block.mark('write')}\n"}
    return head.get(block.kind, "") + block.body
