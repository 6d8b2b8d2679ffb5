"""Report: what people and programs read after a run."""
