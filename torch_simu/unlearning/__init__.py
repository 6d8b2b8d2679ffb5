"""The application: make a transformers model forget, measure what it kept, report it."""
