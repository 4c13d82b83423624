"""SHELF: one file per weight format; the file name is the name on the command line."""
