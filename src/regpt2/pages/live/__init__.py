"""Runs while they train: records that are followed, in, and what a page or a terminal shows of them, out."""
