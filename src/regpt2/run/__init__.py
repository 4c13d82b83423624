"""A training run: a configuration in; checkpoints, a record and a report out."""
