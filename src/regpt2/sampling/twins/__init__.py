"""Faster ways to compute what GPT-2 computes, each checked against it."""
