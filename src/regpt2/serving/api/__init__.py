"""The API of OpenAI: requests in, answers in its form out."""
