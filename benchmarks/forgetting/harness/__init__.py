"""The harness: models taught their rows, the contenders that forget them, and what is measured of each."""
