"""The page to write with: its files, and what it asks for besides the API."""
