"""SHELF: one file per optimizer; the file name is the name in a recipe."""
