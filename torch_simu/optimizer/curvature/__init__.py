"""Where the curvature of a refresh comes from: estimates of a diagonal, or factors from hooks."""
