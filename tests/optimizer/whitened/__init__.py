"""Tests of the whitened step."""
