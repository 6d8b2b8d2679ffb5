"""Attribution within a budget: scores estimated from passes in which each sample changes one layer drawn at random."""
