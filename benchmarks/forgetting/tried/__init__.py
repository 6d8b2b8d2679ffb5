"""What else was tried: runs like the default's with one part of them changed."""
