"""The network: an address in, a checked file or a small answer out."""
