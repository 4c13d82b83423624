"""The runs folder live: its pages and their events."""
