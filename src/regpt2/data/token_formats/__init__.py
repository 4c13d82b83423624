"""SHELF: one file per format of token folders; the file name is the name on the command line."""
