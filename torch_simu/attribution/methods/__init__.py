"""Methods: ways to attribute, exact and approximate."""
