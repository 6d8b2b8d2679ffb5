"""What of each claim its own rows bear out."""
