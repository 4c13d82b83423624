"""Byte-level byte-pair encoding as GPT-2 has it: its merges, and the file that describes it."""
