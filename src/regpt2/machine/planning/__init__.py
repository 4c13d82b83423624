"""A recipe and a machine in; hours, memory, disk and the best micro-batch out."""
