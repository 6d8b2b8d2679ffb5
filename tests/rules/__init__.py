"""Rules that every file keeps."""
