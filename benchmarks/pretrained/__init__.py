"""A model that was really pretrained, and facts that it can be asked: both come from packages, without a network."""
