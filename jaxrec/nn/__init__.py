"""Layers: what owns parameters and knows nothing of data, losses or systems."""
