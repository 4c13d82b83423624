"""Recipes compared: their runs read, their differences tested, tables and pages of them."""
