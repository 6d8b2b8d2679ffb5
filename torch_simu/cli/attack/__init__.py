"""The attack of the command line: alone, and beside `evaluate` and `unlearn`."""
