"""A recipe and options in, one checked configuration of a run out."""
