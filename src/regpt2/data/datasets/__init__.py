"""SHELF: one file per data set; the file name is the name on the command line."""
