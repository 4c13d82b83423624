"""The base of all rooms: errors, files, devices, ranks, records. Nothing here is about language models."""
