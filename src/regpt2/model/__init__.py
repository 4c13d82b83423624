"""Tokens to logits to loss; logits to tokens; weights in and out."""
