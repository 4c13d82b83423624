"""WikiText: the lines of Wikipedia's good and featured articles in, the articles out, each a document.

Its own split is kept: train is train, validation is val, and test is left alone.
"""

from collections.abc import Iterable, Iterator

from regpt2.data.sources import records
from regpt2.data.sources.plan import Document, Part, Plan, Skipped, Slice, Source
from regpt2.data.sources.published import Publication, find, refuse

CONFIGS = ("wikitext-103-raw-v1", "wikitext-103-v1", "wikitext-2-raw-v1", "wikitext-2-v1")
DESCRIPTION = (
    f"WikiText with its own split (CC BY-SA); --config {CONFIGS[0]} (default, 315 MB) or {', '.join(CONFIGS[1:])}"
)

WIKITEXT = Publication(
    name="wikitext",
    repo="Salesforce/wikitext",
    revision="b08601e04326c79dfdd32d625aee71d232d685c3",
    configs={config: f"{config}/*.parquet" for config in CONFIGS},
)
SPLITS = {"train-": "train", "validation-": "val"}  # by the beginning of a file's name


def plan(source: Source) -> Plan:
    """A part for each split: an article may continue in the next file."""
    refuse("wikitext", first=source.first)
    found = find(WIKITEXT, source)
    parts = []
    for beginning in SPLITS:
        files = [file for file in found.files if _name(file.name).startswith(beginning)]
        n_bytes = sum(records.text_bytes(file) for file in files)
        if files:
            parts.append(Part(tuple(map(Slice, files)), n_bytes, source.field))
    return Plan(tuple(parts), found.source, found.revision)


def documents(part: Part, skipped: Skipped) -> Iterator[Document]:
    split = next(split for beginning, split in SPLITS.items() if _name(part.slices[0].file.name).startswith(beginning))
    rows = (row.text for row in records.documents(part, skipped))
    for article in _articles(rows):
        yield Document(article, split=split)


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _articles(rows: Iterable[str]) -> Iterator[str]:
    """Rows joined to articles: all of them together are the file that WikiText was published as.

    A row is a line; a blank one, which was a space, is an empty row. An article begins with the blank line before its
    title, ` = Title = `: a section's title has more signs, and a line of a formula has no blank one before it.
    """
    lines: list[str] = []
    for row in rows:
        if row.startswith(" = ") and not row.startswith(" = = ") and lines and lines[-1] == " \n":
            blank = lines.pop()
            if lines:
                yield "".join(lines)
            lines = [blank]
        lines.append(row or " \n")
    if lines:
        yield "".join(lines)
