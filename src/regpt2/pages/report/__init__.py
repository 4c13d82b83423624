"""The record of a run in; its page, its Markdown and its certificate out."""
