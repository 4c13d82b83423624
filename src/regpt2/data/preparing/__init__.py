"""From documents to token files: workers encode parts, the parts become shards."""
