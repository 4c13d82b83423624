"""The guide's own machinery, and that its pages are what `make guide` would write, without running a chapter."""

import json
from pathlib import Path

import pytest
from agree import difference
from build_guide import differences, quoted, same_picture, with_outputs
from chapter import Chapter, chapters, read_chapter
from notebook import notebook
from play import play
from quote import quote

from regpt2.model.gpt import GPT

CHAPTERS = chapters()


def written(tmp_path: Path, text: str) -> Chapter:
    path = tmp_path / "01_some.md"
    path.write_text(text)
    return read_chapter(path)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_quoted_code_is_that_of_the_source(path: Path) -> None:
    assert quoted(read_chapter(path)).text() == path.read_text(), "run `make guide`"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_notebook_is_the_chapter(path: Path) -> None:
    assert path.with_suffix(".ipynb").read_text() == notebook(read_chapter(path)), "run `make guide`"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_quotes_code_runs_code_and_has_an_exercise(path: Path) -> None:
    chapter = read_chapter(path)
    assert chapter.title.startswith(f"{int(path.name[:2])}. ")
    assert [block for block in chapter.blocks if block.mark("source")], "no quoted code"
    assert len([block for block in chapter.blocks if block.kind == "output"]) >= 2
    text = chapter.text()
    assert "## Exercises" in text and "<summary>Answer</summary>" in text
    for block in chapter.blocks:
        assert block.kind != "picture" or (path.parent / block.picture).exists()


def test_every_picture_and_notebook_belongs_to_a_chapter() -> None:
    drawn = {block.picture for path in CHAPTERS for block in read_chapter(path).blocks if block.kind == "picture"}
    folder = CHAPTERS[0].parent
    assert {path.relative_to(folder).as_posix() for path in folder.glob("images/*")} == drawn
    assert {path.stem for path in folder.glob("*.ipynb")} == {path.stem for path in CHAPTERS}


SOME = """# 1. Some

<!-- source: model/gpt.py: LayerNorm.forward -->
```python
old
```

```python
import matplotlib.pyplot as plt

x = 3
print("x is", x, "and half", x / 2)
plt.plot([1, 2])
```

<!-- within 10% -->
```text
x is 3 and half 1.6
```

![a line](images/line.png)

```bash
# a comment
echo $((x + 1)) two
```

```text
1 two
```

<!-- not run: a GPU -->
```python
x.cuda()
```

<!-- fails -->
```python
{}["key"]
```

```text
KeyError: 'key'
```
"""


def test_a_chapter_is_its_blocks_and_plays_in_order(tmp_path: Path) -> None:
    chapter = written(tmp_path, SOME)
    assert chapter.text() == SOME
    kinds = [block.kind for block in chapter.blocks if block.kind != "text"]
    assert kinds == ["quote", "python", "output", "picture", "bash", "output", "python", "output"]
    played = play(chapter, tmp_path)
    assert played.problems == [] and differences(chapter, played) == []
    assert list(played.outputs.values()) == ["x is 3 and half 1.5\n", "1 two\n", "KeyError: 'key'\n"]
    assert played.pictures["images/line.png"].startswith(b"\x89PNG")
    assert "def forward" in quoted(chapter).text() and "old" not in quoted(chapter).text()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("half 1.6", "half 2.6", "01_some.md:8: line 1: expected 2.6 within 10.00%"),
        ("1 two", "1 three", "01_some.md:23: line 1: expected '1 three', got '1 two'"),
        ("```text\n1 two\n```\n", "", "01_some.md:23: printed, and the page shows no output: '1 two'"),
    ],
)
def test_an_output_that_is_not_what_came_is_named_and_can_be_accepted(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    chapter = written(tmp_path, SOME.replace(old, new))
    played = play(chapter, tmp_path)
    (problem,) = differences(chapter, played)
    assert problem.startswith(said)
    mended = written(tmp_path, with_outputs(chapter, played).text())
    assert differences(mended, play(mended, tmp_path)) == []


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ('```python\nprint(1)\nraise ValueError("so")\n```', "ValueError: so"),
        ("```bash\nls no_such_file\n```", "no_such_file"),
        ("<!-- fails -->\n```python\nx = 1\n```", "expected an error, and none came"),
    ],
)
def test_a_block_that_fails_unasked_stops_the_chapter(tmp_path: Path, code: str, said: str) -> None:
    played = play(written(tmp_path, f"# 1. Some\n\n{code}\n\n```python\nprint(2)\n```\n"), tmp_path)
    (problem,) = played.problems
    assert problem.startswith("01_some.md:") and said in problem
    assert "2\n" not in played.outputs.values()


@pytest.mark.parametrize(
    ("code", "drawn"),
    [
        ("x = 1", False),
        ("from matplotlib.figure import Figure\nfigure = Figure()\nfigure.add_subplot()\nfigure", True),
        ("import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.title('a')", True),
    ],
)
def test_a_picture_is_the_value_of_the_last_line_or_pyplots_figure(tmp_path: Path, code: str, drawn: bool) -> None:
    played = play(written(tmp_path, f"# 1. Some\n\n```python\n{code}\n```\n\n![a](images/a.png)\n"), tmp_path)
    assert (played.problems == []) is drawn and ("images/a.png" in played.pictures) is drawn


def test_a_block_without_an_end_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"01_some.md:2: the block that begins here does not end"):
        written(tmp_path, "# 1. Some\n```python\nx\n")


@pytest.mark.parametrize(
    ("expected", "got", "share", "equal"),
    [
        ("loss 5.549", "loss 5.550", 0.0, True),  # a unit of the last digit
        ("loss 5.549", "loss 5.551", 0.0, False),
        ("loss 5.549", "loss 5.6", 0.01, True),
        ("loss 5.549", "loss 5.7", 0.01, False),
        ("3 of 4", "3 of 5", 0.0, False),  # integers have no last digit to round
        ("1,024 tokens", "1024 tokens", 0.0, True),
        ("a  b", "a b", 0.0, True),
        ("a b", "a c", 0.5, False),
        ("-0.5", "0.5", 0.1, False),
        ("1e-3", "1.1e-3", 0.2, True),
        ("h.0.attn 12", "h.1.attn 12", 0.5, False),  # a number within a name is a word
        ("one\ntwo", "one", 0.0, False),
        ("nan", "1.0", 0.5, False),
    ],
)
def test_words_must_be_equal_and_numbers_near(expected: str, got: str, share: float, equal: bool) -> None:
    assert (difference(expected, got, share) is None) is equal


def test_code_is_quoted_by_name() -> None:
    assert quote("model/gpt.py: LayerNorm.forward").startswith("def forward(self, x: Tensor) -> Tensor:")
    assert quote("model/gpt.py: MLP, Block").count("class ") == 2
    assert quote("model/kernels/loss.py: IGNORED").startswith("IGNORED = -100")
    assert quote("base/ranks/world.py: World").startswith("@dataclass")  # with its decorators
    assert GPT.head.__doc__ is not None and GPT.head.__doc__ in quote("model/gpt.py: GPT.head")
    with pytest.raises(ValueError, match=r"model/gpt.py has no GPT.feet"):
        quote("model/gpt.py: GPT.feet")


def test_a_notebook_has_the_code_as_cells_and_the_quotations_as_text(tmp_path: Path) -> None:
    cells = json.loads(notebook(quoted(written(tmp_path, SOME))))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "%pip install" in code[0] and code[1].startswith("import matplotlib") and code[2].startswith("%%bash")
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert "def forward" in text and "x.cuda()" in text and "<!--" not in text and "1 two" not in text
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_pictures_that_look_alike_are_kept(tmp_path: Path) -> None:
    def drawn(*heights: float) -> bytes:
        code = f"```python\nimport matplotlib.pyplot as plt\nplt.bar(range({len(heights)}), {list(heights)})\n```\n\n"
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return play(written(folder, f"# 1. Some\n\n{code}![a](images/a.png)\n"), folder).pictures["images/a.png"]

    assert same_picture(drawn(1, 2, 3), drawn(1, 2.02, 3))
    assert not same_picture(drawn(1, 2, 3), drawn(3, 2, 1))
