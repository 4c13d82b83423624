"""A token folder in; its counts, excerpts, faults and baselines out."""
