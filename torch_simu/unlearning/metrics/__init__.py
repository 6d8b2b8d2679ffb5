"""Metrics: what a model knows of a set of rows."""
