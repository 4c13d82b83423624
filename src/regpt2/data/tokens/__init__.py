"""Token files: the manifest, the shards, other formats, each read and written."""
