"""What is measured: scripts that write the result files, run as `python -m benchmarks.FOLDER.NAME` from the root."""
