"""Data: sources, tables, example records, features and the input pipeline. It knows no model."""
