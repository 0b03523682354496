"""Ranking models, trained alone or as a stage of another system, and the cascade of recall, pre-ranking and ranking."""
