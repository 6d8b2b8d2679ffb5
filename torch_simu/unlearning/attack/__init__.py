"""Attacks: what brings back a part of what a model has forgotten."""
