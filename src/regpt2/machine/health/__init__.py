"""Checks of this machine in, PASS, WARN or FAIL out."""
