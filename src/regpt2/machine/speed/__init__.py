"""The speed ladder: steps of training in, their times on this machine out."""
