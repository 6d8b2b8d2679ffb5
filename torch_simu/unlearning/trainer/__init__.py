"""Trainer: the method in the Hugging Face Trainer and in loops of accelerate."""
