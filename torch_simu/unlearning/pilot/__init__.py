"""The pilot: short runs on the user's own model, and the choices that they speak for."""
