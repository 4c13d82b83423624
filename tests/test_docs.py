"""What the pages say exists: every command's verb and options, every recipe, every link within the tree."""

import contextlib
import functools
import importlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from regpt2.base.options import parse
from regpt2.cli import MODULES, VERBS, main
from regpt2.config.recipe_files import recipe_names

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
TAKE_RECIPES = ("train", "compare", "plan", "doctor")
COMMAND = re.compile(r"regpt2 (?:-- )?([a-z]+)\b([^`\n|#]*)")


@functools.cache
def help_of(*arguments: str) -> str:
    """What `regpt2 ... --help` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    return printed.getvalue()


def commands(page: Path) -> list[tuple[str, str]]:
    """(verb, the rest of the line) of every command on a page."""
    found = [(match[1], match[2]) for match in COMMAND.finditer(page.read_text())]
    return [(verb, rest) for verb, rest in found if verb in VERBS or "--" in rest]


def options_help(verb: str, rest: str) -> str:
    """The help that lists what may follow: for verbs that take a recipe and its options, that of the recipes too."""
    recipes = set(re.findall(r"\w+", rest)) & set(recipe_names()) or {"demo"}
    trained = "".join(help_of("train", recipe) for recipe in sorted(recipes)) if verb in TAKE_RECIPES else ""
    return trained if verb == "train" else trained + help_of(verb)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_has_a_verb_and_options_that_exist(page: Path) -> None:
    for verb, rest in commands(page):
        assert verb in VERBS, f"{page.name}: regpt2 {verb}"
        if "--plugin" in rest:  # tests/test_plugins.py has the files of these
            continue
        known = options_help(verb, rest)
        for option in re.findall(r"--[a-z][a-z.-]*[a-z]", rest):
            assert option in known, f"{page.name}: regpt2 {verb} has no {option}"
        recipe = rest.split()[0] if rest.split() else ""
        if verb == "train" and re.fullmatch(r"[a-z0-9_]+", recipe):
            assert recipe in recipe_names(), f"{page.name}: there is no recipe {recipe}"


NOT_HERE = re.compile(r"--init |\.toml\b|\bRECIPE\b|--plugin |--help|\$\w")  # what is not here, or in a variable


class Parsed(Exception):
    """The options were understood: nothing shall be done."""


def runs(page: Path) -> list[str]:
    """The lines of a page's blocks that run regpt2, alone or under torchrun, as a shell would give them."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [re.search(r"(?:^|-m |\$ |&& )regpt2 (?:-- )?([a-z]+ .*)$", line) for line in lines]
    plain = [re.split(r" [|>&]{1,2} ?", match[1])[0] for match in found if match]
    return [one for one in plain if one.split()[0] in VERBS and not NOT_HERE.search(one)]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if runs(page)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_the_parser_takes_every_command_as_it_is_written(
    page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def only_parse(*given: Any, **named: Any) -> None:
        parse(*given, **named)
        raise Parsed

    monkeypatch.chdir(tmp_path)
    for verb in VERBS:
        monkeypatch.setattr(importlib.import_module(f"regpt2.commands.{MODULES.get(verb, verb)}"), "parse", only_parse)
    for command in runs(page):
        with contextlib.suppress(SystemExit):
            try:
                main(shlex.split(command, comments=True))
            except Parsed:
                continue
        pytest.fail(f"{command}\n{capsys.readouterr().err}")


def anchors(page: Path) -> set[str]:
    """What `#...` may name on a page: its headings, spelled as GitHub does."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.M):
        plain = re.sub(r"\]\([^)]*\)", "", heading).strip().lower()
        name = re.sub(r"[^\w -]", "", plain).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


def without_code(text: str) -> str:
    """Without fenced blocks and inline code: `[a](b)` in them is no link, # no heading."""
    kept = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)
    return re.sub(r"`([^`\n]*)`", lambda match: match[1].replace("](", "] ("), kept)


def dead_links(page: Path) -> list[str]:
    """Links within the tree whose file, or whose heading in it, does not exist."""
    dead = []
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)", without_code(page.read_text())):
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(f"{page.name} links to {link}")
    return dead


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_their_headings_and_named_files_exist(page: Path) -> None:
    assert dead_links(page) == []
    for target in re.findall(r"`((?:src|tests|benchmarks|docs)/[\w/.]+\.\w+)`", page.read_text()):
        assert (ROOT / target).exists(), f"{page.name} names {target}"


def test_dead_links_and_headings_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One `two`: three!\n\n# Four\n\n# Four\n\n```\n# no heading\n```\n")
    good = "[a](other.md) [b](other.md#one-two-three) [c](other.md#four-1) [d](#here) [e](https://x.org/y) `x[0](z)`"
    page = tmp_path / "page.md"
    page.write_text(f"# Here\n\n{good}\n")
    assert dead_links(page) == []
    page.write_text("[a](no.md) ![b](no.png) [c](other.md#three) [d](#there) [e](other.md#no-heading)")
    assert [dead.split()[-1] for dead in dead_links(page)] == [
        "no.md", "no.png", "other.md#three", "#there", "other.md#no-heading",
    ]  # fmt: skip


def test_every_picture_is_shown_on_a_page() -> None:
    shown = {link for page in PAGES for link in re.findall(r"\]\(([^)\s]+\.png)\)", page.read_text())}
    names = {Path(link).name for link in shown}
    assert [path.name for path in (ROOT / "docs/images").iterdir() if path.name not in names] == []


def test_the_pages_do_have_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 20
    assert sum(len(runs(page)) for page in PAGES) > 100


SOURCES = {
    path.relative_to(ROOT).as_posix(): path
    for room in ("src", "tests", "benchmarks")
    for path in ROOT.glob(f"{room}/**/*.py")
}
OF_OTHERS = {"train.py", "sample.py"}  # nanoGPT's, in docs/interchange.md


def named_in(page: Path) -> list[tuple[int, str, list[str]]]:
    """(line, file, names within it) of each `path/file.py`, and `path/file.py`: `Class.name`, on a page."""
    found = []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        for match in re.finditer(r"`([\w/]+\.py)`(?:: `([A-Za-z_][\w.]*)(?:\(\))?`)?", line):
            found.append((number, match[1], match[2].split(".") if match[2] else []))
    return found


def files_called(name: str) -> list[Path]:
    """The files that a page may mean: by their path from the root, from the package, or in part."""
    return [path for there, path in SOURCES.items() if f"/{there}".endswith(f"/{name}")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_named_file_exists_and_holds_what_is_said_to_be_in_it(page: Path) -> None:
    missing = []
    for line, name, within in named_in(page):
        files = files_called(name)
        if not files and not (page.name == "interchange.md" and name in OF_OTHERS):
            missing.append(f"{page.name}:{line}: there is no file {name}")
        wanted = [re.compile(rf"^\s*(?:def|class) {one}\b|^\s*(?:self\.)?{one}\b[^=\n]*= ", re.M) for one in within]
        if files and not any(all(one.search(file.read_text()) for one in wanted) for file in files):
            missing.append(f"{page.name}:{line}: no {'.'.join(within)} in {name}")
    assert missing == []


def test_names_that_are_missing_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("| `base/device.py`: `pick_device` |\n`model/gpt.py`: `GPT.init_weights`, `no/such.py`")
    first, second, third = named_in(page)
    assert first == (1, "base/device.py", ["pick_device"])
    assert (second, third) == ((2, "model/gpt.py", ["GPT", "init_weights"]), (2, "no/such.py", []))
    assert files_called("no/such.py") == []
