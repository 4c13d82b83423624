"""PDFs made by hand and by pypdf: their text, and what is left out by which reason."""

import io
import zlib
from collections.abc import Sequence

import pypdf
import pytest
from pypdf.generic import DictionaryObject, NameObject, StreamObject

from regpt2.data.sources.kinds import pdf_text as module
from regpt2.data.sources.kinds.pdf_text import pdf_text
from regpt2.data.sources.plan import Skipped


def pdf(pages: Sequence[bytes], *, filtered: str = "", kids: str = "") -> bytes:
    """A PDF from its specification: a catalog, a font, and for each page its drawing commands."""
    numbers = [4 + 2 * n for n in range(len(pages))]
    kids = kids or " ".join(f"{n} 0 R" for n in numbers)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, commands in zip(numbers, pages, strict=True):
        resources = "/Resources << /Font << /F1 3 0 R >> >>"
        objects.append(f"<< /Type /Page /Parent 2 0 R {resources} /Contents {number + 1} 0 R >>".encode())
        objects.append(b"<< /Length %d %b >>\nstream\n%b\nendstream" % (len(commands), filtered.encode(), commands))
    data, places = b"%PDF-1.4\n", []
    for n, content in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%b\nendobj\n" % (n, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    tail = b"trailer\n<< /Root 1 0 R /Size %d >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(data))
    return data + head + table + tail


def drawn(text: str) -> bytes:
    return f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode()


def read(data: bytes) -> tuple[str | None, dict[str, int]]:
    skipped = Skipped()
    skipped.file = "a.pdf"
    text = pdf_text(io.BytesIO(data), skipped)
    assert all(place.startswith("a.pdf") for place in skipped.first.values())
    return text, dict(skipped)


def test_the_text_of_the_pages_comes_in_order_with_a_blank_line_between() -> None:
    assert read(pdf([drawn("First page."), b"", drawn("Third page.")])) == ("First page.\n\nThird page.", {})


def test_a_file_without_text_is_left_out_as_perhaps_scanned() -> None:
    assert read(pdf([b"", b"0 0 m 5 5 l S"])) == (None, {"PDF files without text (scanned?)": 1})


@pytest.mark.parametrize(("user", "text"), [("", "Secret."), ("password", None)])
def test_an_encrypted_file_is_read_only_with_an_empty_password(user: str, text: str | None) -> None:
    writer, file = pypdf.PdfWriter(clone_from=io.BytesIO(pdf([drawn("Secret.")]))), io.BytesIO()
    writer.encrypt(user, "owner", algorithm="RC4-128")
    writer.write(file)
    assert read(file.getvalue()) == (text, {} if text else {"PDF files encrypted": 1})


@pytest.mark.parametrize("n_bytes", [0, 1, 8, 100, 400])
def test_a_truncated_file_is_left_out_as_damaged_or_read_as_far_as_it_can_be(n_bytes: int) -> None:
    text, skipped = read(pdf([drawn("Some text.")])[:n_bytes])
    assert text == "Some text." or (text is None and sum(skipped.values()) == 1)


@pytest.mark.parametrize("data", [b"no pdf", b"%PDF-1.4\n" + b"1 0 obj\n" * 2000, b"%PDF-1.7\n" + b"[" * 20_000])
def test_what_is_no_pdf_is_damaged(data: bytes) -> None:
    assert read(data) == (None, {"PDF files damaged": 1})


def test_a_circle_of_pages_ends() -> None:
    text, skipped = read(pdf([drawn("Once.")], kids="4 0 R 2 0 R"))
    assert text == "Once." or (text is None and sum(skipped.values()) == 1)


def test_a_group_of_pages_that_lies_in_itself_is_damaged() -> None:
    data = pdf([drawn("x")]).replace(b"/Type /Pages", b"/Type /Pages /Parent 2 0 R")
    data = data.replace(b"/Resources << /Font << /F1 3 0 R >> >>", b"")
    assert read(data) == (None, {"PDF files damaged": 1})


def test_a_page_that_unpacks_to_too_much_is_left_out() -> None:
    bomb = zlib.compress(b"0 0 m\n" * 2_000_000)
    text, skipped = read(pdf([bomb], filtered="/Filter /FlateDecode"))
    assert text is None and skipped.pop("PDF pages with more than 8 MiB of drawing commands") == 1
    assert skipped == {"PDF files without text (scanned?)": 1}


def with_forms(*, first: str, last: str) -> bytes:
    """A page that draws form /A, which draws /B ten times, and so on to /H, which draws `last`."""
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf([drawn("Page.")])))
    names, forms = [f"/{letter}" for letter in "ABCDEFGH"], []
    for name in names:
        form = StreamObject()
        form.update({NameObject("/Type"): NameObject("/XObject"), NameObject("/Subtype"): NameObject("/Form")})
        following = names[names.index(name) + 1] if name != "/H" else last
        form.set_data(f"{following} Do ".encode() * 10)
        forms.append(writer._add_object(form))
    named = DictionaryObject({NameObject(name): form for name, form in zip(names, forms, strict=True)})
    resources = DictionaryObject({NameObject("/XObject"): named})
    for holder in (writer.pages[0], *(form.get_object() for form in forms)):
        holder[NameObject("/Resources")] = resources
    contents = StreamObject()
    contents.set_data(first.encode())
    writer.pages[0][NameObject("/Contents")] = writer._add_object(contents)
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("first", "last"), [("/A Do", "/none"), ("/A\0Do", "/none"), ("/H Do", "/H")], ids=["many", "hidden", "circle"]
)
def test_forms_that_multiply_or_draw_themselves_are_left_out(first: str, last: str) -> None:
    _, skipped = read(with_forms(first=first, last=last))
    assert skipped["PDF pages with more than 8 MiB of drawing commands"] == 1


def test_a_form_that_is_drawn_a_few_times_does_no_harm() -> None:
    assert read(with_forms(first="/G Do", last="/none"))[1] == {"PDF files without text (scanned?)": 1}


def test_large_files_and_many_pages_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PAGES", 2)
    assert read(pdf([drawn("a")] * 3)) == (None, {"PDF files with more than 2 pages": 1})
    monkeypatch.setattr(module, "MOST_BYTES", 1 << 20)
    assert read(b"%PDF" + bytes(1 << 20)) == (None, {"PDF files larger than 1 MiB": 1})
