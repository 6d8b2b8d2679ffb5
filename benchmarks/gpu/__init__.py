"""Everything that is said of a GPU, checked on one in one call."""
