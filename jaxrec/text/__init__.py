"""Texts: the item encoder and its alignment with what shoppers do."""
