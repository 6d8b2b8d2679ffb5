"""Rehearsal: rows that a model writes itself, so that it keeps what no row of the retain set says."""
