"""The text of a PDF. In: the bytes of a file; out: the text of its pages, one after another.

pypdf reads. What cannot be read (encrypted, damaged, pictures of text) is left out and counted by its reason. Amounts
are limited, not time, so that a file is read or left out alike on every machine.
"""

import importlib
import importlib.util
import io
import logging
import re
from collections.abc import Iterator
from typing import IO, Any

from regpt2.data.sources.plan import Skipped

MOST_BYTES = 256 << 20  # a larger file is left out: it is held in memory
MOST_PAGES = 20_000
MOST_PAGE_BYTES = 8 << 20  # of a page's drawing commands, a form's each time it is drawn; pages have some 10 kB
MOST_CHARACTERS = 64 << 20


_MOST_LEVELS = 100  # of groups of pages within each other
_DRAWS = re.compile(rb"/([^\s/\[\]<>(){}%]+)\s+Do\b")  # a form by its name


def is_installed() -> bool:
    return importlib.util.find_spec("pypdf") is not None


def pdf_text(file: IO[bytes], skipped: Skipped) -> str | None:
    """The text of all pages, a blank line between them; None for a file that is left out, which is counted."""
    data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        skipped.add(f"PDF files larger than {MOST_BYTES >> 20} MiB")
        return None
    pypdf: Any = importlib.import_module("pypdf")
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of every small fault of a file
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            skipped.add("PDF files encrypted")
            return None
        if len(reader.pages) > MOST_PAGES:
            skipped.add(f"PDF files with more than {MOST_PAGES:,} pages")
            return None
        text = "\n\n".join(_pages(reader, skipped))
    except (pypdf.errors.DependencyError, NotImplementedError):
        skipped.add("PDF files encrypted")
        return None
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # damaged files end in any of Python's errors
        skipped.add("PDF files damaged", f"{skipped.file} ({type(error).__name__})")
        return None
    if not text.strip():
        skipped.add("PDF files without text (scanned?)")
        return None
    return text


def _pages(reader: Any, skipped: Skipped) -> Iterator[str]:
    n_characters = 0
    for page in reader.pages:
        contents = page.get_contents()
        if contents is not None and _commands(page, contents.get_data(), {}) > MOST_PAGE_BYTES:
            skipped.add(f"PDF pages with more than {MOST_PAGE_BYTES >> 20} MiB of drawing commands")
            continue
        text = page.extract_text().strip()
        n_characters += len(text)
        if n_characters > MOST_CHARACTERS:
            skipped.add(f"PDF files kept up to {MOST_CHARACTERS >> 20} million characters")
            return
        if text:
            yield text


def _commands(node: Any, data: bytes, known: dict[int, int]) -> int:
    """The bytes of commands that drawing a page or form takes: forms within forms can multiply without end.

    `known` has those of forms by their number in the file. One that draws itself counts as too much.
    """
    holder, n_above = node, 0
    while "/Resources" not in holder and "/Parent" in holder:  # pages inherit them
        holder, n_above = holder["/Parent"], n_above + 1
        if n_above > _MOST_LEVELS:
            raise ValueError("its pages lie in a circle")  # in which pypdf would search without end
    costs: dict[bytes, int] = {}
    forms = holder["/Resources"].get("/XObject", {}) if "/Resources" in holder else {}
    for name, reference in getattr(forms, "get_object", dict)().items():
        number = getattr(reference, "idnum", 0)
        form = reference.get_object()
        if form.get("/Subtype") != "/Form":
            continue
        if number not in known:
            known[number] = MOST_PAGE_BYTES + 1
            known[number] = _commands(form, form.get_data(), known)
        costs[name[1:].encode()] = known[number]
    if not costs:
        return len(data)
    drawn = _DRAWS.findall(data)
    n_others = data.count(b"Do") - len(drawn)  # perhaps a name written in another way
    total = len(data) + sum(costs.get(name, 0) for name in drawn) + n_others * max(costs.values())
    return min(total, MOST_PAGE_BYTES + 1)
