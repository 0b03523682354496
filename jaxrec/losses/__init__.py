"""Losses: pure functions of scores or log-probabilities, one value per example; they never see a model."""
