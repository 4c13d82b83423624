"""Runs on paper: the record read, charts, tables, HTML that cannot carry code; and the report made of them."""

from pathlib import Path

PAGE_CSS = Path(__file__).with_name("page.css")  # the style that every page shares
