"""What a machine does and what a run takes: timed steps (`steps`), rates (`rates`), formulas (`memory`, `cost`)."""
