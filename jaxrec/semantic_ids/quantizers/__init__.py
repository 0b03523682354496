"""Quantizers: vectors in, codes out; each `fit(key, x, config)`, `encode(fitted, x)`, `decode(fitted, codes)`."""
