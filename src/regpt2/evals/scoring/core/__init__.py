"""CORE: its tasks, their prompts and how they are judged. evals/core.py is the entry."""
