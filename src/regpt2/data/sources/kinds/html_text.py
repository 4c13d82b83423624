"""The text that a browser would show. In: the bytes of an HTML file; out: its text, one line for each block.

Beautiful Soup parses, with lxml: Python's own parser can take hours for some kB of broken tags. Scripts, styles, hidden
elements and the head are left out, entities are decoded, white space is joined as in a browser, and blocks, items of
lists and rows of tables get lines of their own. No style sheet is read.
"""

import codecs
import importlib
import importlib.util
import re
import warnings
from typing import IO, Any

from regpt2.data.sources.plan import Skipped
from regpt2.data.sources.text_encoding import MARKS

MOST_BYTES = 8 << 20  # a larger file is left out: of tags alone it would take 2 GB of memory and a minute or two

_DECLARED = re.compile(
    rb"""<(?:meta\b[^>]{0,400}?\bcharset|\?xml\b[^>]{0,400}?\bencoding)\s*=\s*["']?\s*([\w.:-]{2,40})""", re.I
)
_DECLARED_WITHIN = 4096
_ENCODINGS = re.compile(  # of the HTML standard; Python knows others, which are slow or no encodings of characters
    "utf-8|ascii|iso8859-[0-9]+|cp125[0-8]|cp866|cp874|koi8-[ru]|mac-(roman|cyrillic)|gb2312|gbk|gb18030|big5(hkscs)?|"
    "euc_jp|euc_kr|shift_jis|cp932|cp949|iso2022_jp"
)
_AS_BROWSERS_DO = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
}

_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.I)
_LEFT_OUT = re.compile(
    "head|script|style|template|noscript|iframe|object|svg|canvas|audio|video|select|datalist|textarea"
)
_PARAGRAPH = re.compile("p|h[1-6]|blockquote|pre|ul|ol|dl|table|figure")
_BLOCK = re.compile(
    "address|article|aside|body|caption|center|dd|details|dialog|div|dt|fieldset|figcaption|footer|form|header|hgroup|hr|"
    "html|legend|li|main|menu|nav|option|section|summary|tbody|tfoot|thead|title|tr"
)
_SPACES = re.compile(r"[ \t\n\r\f]+")  # a no-break space is none of these


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("bs4", "lxml"))


def html_text(file: IO[bytes], skipped: Skipped) -> str | None:
    """The visible text; None for a file that is left out, which is counted."""
    data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        skipped.add(f"HTML files larger than {MOST_BYTES >> 20} MiB")
        return None
    text = _decoded(data, skipped)
    soup: Any = importlib.import_module("bs4")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pages that look like XML or like an address
            return _visible(soup.BeautifulSoup(text, "lxml"), soup)
    except (RecursionError, AssertionError, ValueError, soup.ParserRejectedMarkup) as error:
        skipped.add("HTML files that cannot be parsed", f"{skipped.file} ({type(error).__name__})")
        return None


def _decoded(data: bytes, skipped: Skipped) -> str:
    """By the byte-order mark, else by what the file says of itself, else UTF-8."""
    mark = next((mark for mark in MARKS if data.startswith(mark)), b"")
    declared = None if mark else _DECLARED.search(data[:_DECLARED_WITHIN])
    encoding = _known(declared.group(1).decode("ascii", "replace")) if declared else MARKS.get(mark, "utf-8")
    data = data[len(mark) :]
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        skipped.add(f"files kept with invalid {encoding.upper()} replaced")
        return data.decode(encoding, "replace")


def _known(name: str) -> str:
    """Python's name of an encoding that a page may have; others are read as UTF-8."""
    try:
        found = codecs.lookup(name).name
    except LookupError:
        return "utf-8"
    return _AS_BROWSERS_DO.get(found, found) if _ENCODINGS.fullmatch(found) else "utf-8"


def _is_hidden(element: Any) -> bool:
    attributes = element.attrs
    return (
        _LEFT_OUT.fullmatch(element.name) is not None
        or "hidden" in attributes
        or str(attributes.get("aria-hidden", "")).lower() == "true"
        or _HIDDEN.search(str(attributes.get("style", ""))) is not None
    )


def _visible(tree: Any, soup: Any) -> str:
    """Walk the elements without recursion: the text of a page, as its `innerText` would be."""
    lines, waiting = _Lines(), [(tree, False)]
    while waiting:
        node, is_left = waiting.pop()
        if isinstance(node, soup.Tag):
            if is_left:
                lines.leave(node.name)
            elif not _is_hidden(node):
                lines.enter(node.name)
                waiting.append((node, True))
                waiting.extend((child, False) for child in reversed(node.contents))
        elif type(node) is soup.NavigableString or isinstance(node, soup.CData):
            lines.add(str(node))
    return lines.text()


class _Lines:
    """Text with the line ends that blocks need between them, never more at once than the largest asks for."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._ends = 0  # lines to end before the next text
        self._space, self._at_start, self._pre, self._cells = False, True, 0, 0

    def enter(self, name: str) -> None:
        if name == "pre":
            self._pre += 1
        if name == "tr":
            self._cells = 0
        if name in ("td", "th"):
            self._cells += 1
            if self._cells > 1 and not self._ends:
                self._write("\t")
        elif name == "br":
            self._write("\n")
        else:
            self._block(name)

    def leave(self, name: str) -> None:
        self._pre -= name == "pre"
        if name not in ("br", "td", "th"):
            self._block(name)

    def add(self, text: str) -> None:
        if self._pre:
            if text:
                self._begin()
                self._pieces.append(text)
                self._at_start = text.endswith("\n")
            return
        for n, word in enumerate(_SPACES.split(text)):
            self._space |= n > 0
            if word:
                self._begin()
                if self._space and not self._at_start:
                    self._pieces.append(" ")
                self._pieces.append(word)
                self._space = self._at_start = False

    def text(self) -> str:
        return "".join(self._pieces).strip("\n") + "\n" if self._pieces else ""

    def _block(self, name: str) -> None:
        if n_ends := 2 if _PARAGRAPH.fullmatch(name) else 1 if _BLOCK.fullmatch(name) else 0:
            self._ends = max(self._ends, n_ends)
            self._space, self._at_start = False, True

    def _begin(self) -> None:
        if self._pieces and self._ends:
            self._pieces.append("\n" * self._ends)
        self._ends = 0

    def _write(self, text: str) -> None:
        self._begin()
        self._pieces.append(text)
        self._space, self._at_start = False, True
