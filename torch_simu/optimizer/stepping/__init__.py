"""Stepping: from the entries and the state of a group to new weights."""
