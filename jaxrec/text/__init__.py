"""Texts: the encoder of items, queries and prefixes, and its alignment with behavior."""
