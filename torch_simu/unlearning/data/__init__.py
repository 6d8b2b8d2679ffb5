"""Data: rows, the token sequences that they become, and batches of them."""
