"""A run, on paper: its record read (`record`), drawn (`curves`), set as a page (`page`, `markup`, `page.css`)."""
