"""Serving: a trained run answers requests, from a file (batch.py) or over HTTP (http.py)."""
