"""The documentation as a site. In: the pages of the repository; out: HTML that also opens offline.

    python tests/guide/site.py --out runs/site

The pages are laid out in a temporary folder as they are in the repository, so links between them hold. Each file of
the source that a page names becomes a page too, and its name a link. mkdocs builds strictly: a dead link fails.
"""

import argparse
import logging
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from chapter import FOLDER, ROOT, chapters, read_chapter

PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "benchmarks/dry_gpu/README.md"]
PARTS = {
    "Train": ["training", "data", "modern", "fixed_data", "compare", "speed", "clusters", "reliability"],
    "After training": ["evaluation", "sampling", "chat", "serving", "interchange", "python"],
}
LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".sh": "bash", ".json": "json", ".c": "c", "": "text"}
MOST_BYTES = 60_000
"""A larger file, a result in JSON say, is offered as it is."""
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)")
NAMED = re.compile(r"(?<!\[)`((?:src/regpt2/|tests/|benchmarks/|deploy/)?[\w/]+\.(?:py|toml|yaml|sh|json))`(?!\])")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "site")
    options = parser.parse_args()
    from mkdocs.commands.build import build  # of the extra `guide`; the tests of this file do without
    from mkdocs.config import load_config

    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}; give a folder that can be written")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder))
        config = load_config(
            str(ROOT / "mkdocs.yml"),
            docs_dir=folder,
            site_dir=str(options.out.resolve()),
            nav=navigation(),
            strict=True,
        )
        build(config)
    print(f"the site: {options.out}/index.html")
    return 0


def pages() -> list[Path]:
    """Markdown of the repository that the site shows."""
    docs = sorted((ROOT / "docs").rglob("*.md"))
    return [*(ROOT / name for name in PAGES), *docs]


def navigation() -> list[Any]:
    """The site's tree: the guide, then the pages by purpose; every other page under Reference."""
    named = {name for names in PARTS.values() for name in names}
    others = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.stem not in {*named, "results"}]
    map_of_guide = [path.relative_to(ROOT).as_posix() for path in (FOLDER / "README.md",) if path.exists()]
    guide = [*map_of_guide, *({read_chapter(path).title: f"docs/guide/{path.name}"} for path in chapters())]
    parts = [{part: [f"docs/{name}.md" for name in names]} for part, names in PARTS.items()]
    certificates = [{path.stem: f"docs/results/{path.name}"} for path in sorted((ROOT / "docs/results").glob("*.md"))]
    results = ["docs/results.md", {"Certificates": certificates}]
    reference = [*(f"docs/{path.name}" for path in others), *PAGES[1:]]
    return [{"regpt2": "README.md"}, {"Guide": guide}, *parts, {"Results": results}, {"Reference": reference}]


def lay_out(folder: Path) -> None:
    """Copy pages and pictures; every file that they link to or name becomes a page beside it."""
    sources: set[Path] = set()
    for page in pages():
        target = folder / page.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(with_links(page.read_text(), page, sources))
    for picture in (path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".ipynb", ".css")):
        target = folder / picture.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
    for source in sources:
        as_page(source, folder)


def with_links(text: str, page: Path, sources: set[Path]) -> str:
    """A page whose links to files, and names of files, lead to the pages of these; adds them to `sources`."""
    out = []
    fenced = False
    for line in text.split("\n"):
        if line.startswith("<!-- "):
            continue
        if line.startswith("```"):
            fenced = not fenced
        if not fenced:
            line = LINK.sub(lambda match: _link(match, page, sources), line)
            line = NAMED.sub(lambda match: _named(match, page, sources), line)
        out.append(line)
    return "\n".join(out)


def _link(match: re.Match[str], page: Path, sources: set[Path]) -> str:
    target = (page.parent / match[2]).resolve()
    if target.is_dir() or not target.is_relative_to(ROOT):
        return match[0]
    if not target.is_file() or target.suffix in (".md", ".png", ".ipynb"):
        return match[0]
    sources.add(target)
    return f"{match[1]}{match[2]}.md)"


def _named(match: re.Match[str], page: Path, sources: set[Path]) -> str:
    """A link, if exactly one file has this path, or ends with it."""
    found = [path for path in _files() if f"/{path.as_posix()}".endswith(f"/{match[1]}")]
    if len(found) != 1:
        return match[0]
    sources.add(ROOT / found[0])
    up = "../" * len(page.relative_to(ROOT).parent.parts)
    return f"[`{match[1]}`]({up}{found[0].as_posix()}.md)"


_found: list[Path] = []


def _files() -> list[Path]:
    """Files that a page may name, relative to the repository."""
    if not _found:
        for room in ("src", "tests", "benchmarks", "deploy"):
            _found.extend(path.relative_to(ROOT) for path in (ROOT / room).rglob("*") if path.suffix in LANGUAGES)
    return _found


def as_page(source: Path, folder: Path) -> None:
    """A file as a page: its text with numbered lines."""
    target = folder / f"{source.relative_to(ROOT)}.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = source.read_text()
    if len(text) > MOST_BYTES:
        text = f"{text[:MOST_BYTES]}\n... ({len(text):,} bytes)"
    fence = "````" if "```" in text else "```"
    language = LANGUAGES.get(source.suffix, "text")
    head = f"---\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n# {source.relative_to(ROOT).as_posix()}\n\n"
    target.write_text(f'{head}{fence}{language} linenums="1"\n{text.rstrip()}\n{fence}\n')


if __name__ == "__main__":
    raise SystemExit(main())
