"""Clients that keep a generation server busy, and what they measure."""
