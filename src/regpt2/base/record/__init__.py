"""What a run records while it runs: events in; metrics.jsonl and trackers out."""
