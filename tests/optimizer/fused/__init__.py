"""The clipped step as one Triton kernel."""
