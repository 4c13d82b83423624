"""Token ids in, the model's continuation out, and the fast ways to compute it."""
