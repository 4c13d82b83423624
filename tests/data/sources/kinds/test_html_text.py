"""HTML against what a browser shows: expectations written by hand, hostile files, and encodings."""

import io
import time

import pytest

from regpt2.data.sources.kinds.html_text import MOST_BYTES, html_text
from regpt2.data.sources.plan import Skipped

PAGE = """<!DOCTYPE html>
<html><head><title>Not on the page</title><style>p { color: red }</style><script>var a = "<p>no</p>";</script></head>
<body>
<h1>Tea &amp; time</h1>
<p>One <b>bold</b>word
   on two    lines.&nbsp;End.<p>Never closed <a href="x">link</a>.
<!-- a comment --><p hidden>hidden</p><div style="color:red; DISPLAY : none">styled away</div>
<span aria-hidden="true">x</span><ul><li>first<li>second <i>item</i></ul>
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td> 2 </td></tr></table>
<pre>keep
   this</pre>
Line<br>broken<script>alert(1)</script> here.
<noscript>no</noscript><template>no</template><textarea>no</textarea>
<div><div>inner</div></div>&lt;tag&gt; &#8364; &eacute;
</body></html>"""
SHOWN = """Tea & time

One boldword on two lines.\xa0End.

Never closed link.

first
second item

a\tb
1\t2

keep
   this

Line
broken here.
inner
<tag> € é
"""


def read(data: bytes) -> tuple[str | None, Skipped]:
    skipped = Skipped()
    skipped.file = "a.html"
    return html_text(io.BytesIO(data), skipped), skipped


def test_a_page_is_what_a_browser_shows() -> None:
    assert read(PAGE.encode()) == (SHOWN, {})


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'<meta charset="utf-8"><p>\xc3\xbc', "ü\n"),
        ("<p>ü€".encode("utf-16"), "ü€\n"),
        (b"\xef\xbb\xbf<meta charset=latin-1><p>\xc3\xbc", "ü\n"),  # the mark goes first
        (b"<meta charset=iso-8859-1><p>\xfc \x80", "ü €\n"),  # as browsers do: windows-1252
        (b"<meta http-equiv=Content-Type content='text/html; charset=koi8-r'><p>\xc4\xc1", "да\n"),
        (b'<?xml version="1.0" encoding="Shift_JIS"?><p>\x93\xfa\x96{', "日本\n"),
        (b"<meta charset=utf-16><p>a\xc3\xbc", "aü\n"),  # it cannot be: these bytes are ASCII
        (b"<meta charset=unicode_escape><p>\\n\xc3\xbc", "\\nü\n"),  # encodings of Python alone
        (b"<meta charset=no-such><p>\xc3\xbc", "ü\n"),
        (b"<p>\xc3\xbc", "ü\n"),
    ],
)
def test_the_encoding_is_the_mark_or_what_the_page_says_or_utf8(data: bytes, text: str) -> None:
    assert read(data) == (text, {})


def test_what_is_not_in_its_encoding_is_replaced_and_counted() -> None:
    assert read(b"<p>a\xff") == ("a\ufffd\n", {"files kept with invalid UTF-8 replaced": 1})


@pytest.mark.parametrize(
    "piece",
    [
        "<div>",
        "<p>x",
        "<a ",
        "<a b='",
        "<!--",
        "</a",
        "<![CDATA[",
        "<li>a</ul>",
        "<table>",
        "&am",
        "<pre>",
        "<b><i></b>",
    ],
)
def test_no_nesting_and_no_broken_tags_take_long(piece: str) -> None:
    began = time.process_time()
    read((piece * (20_000 // len(piece))).encode())
    assert time.process_time() - began < 5  # mostly below 0.2; Python's own parser takes minutes for `<a `


def test_a_large_page_is_left_out() -> None:
    assert read(b" " * (MOST_BYTES + 1)) == (None, {"HTML files larger than 8 MiB": 1})


def test_nothing_and_a_page_without_text_give_nothing() -> None:
    assert read(b"")[0] == "" and read(b"<script>x</script>\n \n")[0] == "" and read(b"\0" * 100)[1] == {}
