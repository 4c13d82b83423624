"""Where text comes from: files, folders and the hub in, documents out."""
