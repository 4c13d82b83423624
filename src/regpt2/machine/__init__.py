"""What a machine can do: its speed, its health, and what a run on it takes."""
