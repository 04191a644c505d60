"""Continuing a text, one token after another."""
