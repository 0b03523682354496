"""The table of IDs: which item has which, what is done about shared ones, how good they are, version by version."""
