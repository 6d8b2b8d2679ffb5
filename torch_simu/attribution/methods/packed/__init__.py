"""Many samples in one pass, over cached keys and values."""
