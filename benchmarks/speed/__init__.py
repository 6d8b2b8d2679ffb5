"""Time and memory of attribution, hooks and deltas."""
