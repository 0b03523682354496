"""Layers: modules with parameters, independent of data, losses and systems."""
