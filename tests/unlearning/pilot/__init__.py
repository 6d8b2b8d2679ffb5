"""Tests of the pilot."""
