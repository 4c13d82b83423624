"""One update over several ranks: DDP, sharded, or in an order that gives equal bits."""
