"""Loss to gradients to better weights to disk."""
