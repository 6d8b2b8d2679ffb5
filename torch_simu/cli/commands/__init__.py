"""Commands: what each of them takes, and what it shows."""
