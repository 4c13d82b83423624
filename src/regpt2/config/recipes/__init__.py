"""Recipes as TOML: each states command, hardware, time and result at its head."""
