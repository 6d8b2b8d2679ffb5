"""Neurons as units: the rows that make them train beside their columns."""
