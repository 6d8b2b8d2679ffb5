"""What is forgotten and kept, of the demo and of TOFU, and what comes back."""
