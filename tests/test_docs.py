"""What the pages say exists: every command's verb and options, every recipe, every link within the tree."""

import contextlib
import functools
import io
import re
from pathlib import Path

import pytest

from regpt2.cli import VERBS, main
from regpt2.config.recipe_files import recipe_names

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "benchmarks/README.md",
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for target in re.findall(r"`((?:src|tests|benchmarks|docs)/[\w/.]+\.\w+)`", text):
        assert (ROOT / target).exists(), f"{page.name} names {target}"


def test_the_pages_do_have_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 20


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
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
