"""Time and memory of a step, beside those of other optimizers."""
