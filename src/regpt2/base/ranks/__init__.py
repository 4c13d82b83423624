"""Several processes as one: ranks that meet, exchange, watch each other and stop together."""
