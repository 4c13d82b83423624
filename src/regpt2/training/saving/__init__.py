"""What checkpoints hold beyond those that a run resumes from: the best model, and whether the parts fit together."""
