"""The table of IDs: items and their IDs, collisions, quality, versions."""
