"""Pages of the documentation that programs write: `python -m benchmarks.pages` writes them anew, tests compare them."""
