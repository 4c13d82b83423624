"""The server itself: who may ask, how much, how long, and how it ends."""
