"""Requests in, pieces of text out, from a batch that they join and leave while it runs."""
