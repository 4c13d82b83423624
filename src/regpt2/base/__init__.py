"""The ground: errors, files, devices, ranks, records. Knows nothing of language models."""
