"""Models over HTTP: the API of OpenAI, a page to write with, runs to watch."""
