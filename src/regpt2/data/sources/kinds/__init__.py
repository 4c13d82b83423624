"""Files that hold text in a form of their own: HTML, PDF, CSV."""
