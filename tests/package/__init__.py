"""What is built and installed, and what it needs."""
