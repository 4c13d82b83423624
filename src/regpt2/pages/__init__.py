"""Runs on paper: read (`record`), drawn (`panels`, `drawing`), told (`results` ...), set (`page`, `markdown`)."""
