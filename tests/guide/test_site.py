"""The site's pages: their links lead to files as pages, and every page has its place."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """tests/guide/site.py, which cannot be imported by its name: Python has a module `site` of its own."""
    spec = importlib.util.spec_from_file_location("guide_site", HERE / "site.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_link_or_name_of_a_file_leads_to_its_page(site: ModuleType) -> None:
    text = "[it](../../src/regpt2/model/gpt.py), `model/gpt.py`, `no/such.py`, `__init__.py`, [2](02_module.md#code)"
    block = "```\n`model/gpt.py` in a block\n```"
    sources: set[Path] = set()
    found = site.with_links(f"{text}\n<!-- varies -->\n{block}", site.ROOT / "docs" / "guide" / "nowhere.md", sources)
    first, *rest = found.split("\n")
    assert first == (
        "[it](../../src/regpt2/model/gpt.py.md), [`model/gpt.py`](../../src/regpt2/model/gpt.py.md), `no/such.py`, "
        "`__init__.py`, [2](02_module.md#code)"
    )
    assert "\n".join(rest) == block
    assert sources == {site.ROOT / "src/regpt2/model/gpt.py"}


def test_every_page_is_laid_out_and_has_its_place(site: ModuleType, tmp_path: Path) -> None:
    site.lay_out(tmp_path)

    def places(tree: object) -> set[str]:
        if isinstance(tree, str):
            return {tree}
        return {place for branch in (tree.values() if isinstance(tree, dict) else tree) for place in places(branch)}

    laid_out = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.md")}
    assert places(site.navigation()) == {path.relative_to(site.ROOT).as_posix() for path in site.pages()} <= laid_out
    source = (tmp_path / "src/regpt2/model/gpt.py.md").read_text()
    assert "# src/regpt2/model/gpt.py" in source and 'python linenums="1"' in source and "class GPT(" in source
