"""Tests of what a step descends: objectives, balance, adversary."""
