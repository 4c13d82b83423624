"""What the pages say exists: every command's verb and options, every recipe, every link within the tree."""

import contextlib
import functools
import io
import re
from pathlib import Path

import pytest

from regpt2.cli import VERBS, main
from regpt2.config.run import recipe_names

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
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
