"""Demo: a small model that memorizes fiction and forgets a part of it by every method."""
