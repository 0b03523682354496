"""TIGER and FORGE: an encoder-decoder that generates the next item's ID."""
