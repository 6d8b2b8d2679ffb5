"""Deltas of rows, which make selected neurons."""
