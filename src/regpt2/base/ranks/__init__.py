"""Several processes as one: ranks connect, exchange values, watch each other and stop together."""
