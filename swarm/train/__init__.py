"""Ties data, model and averaging together: the inner loop, checkpoints, and one peer's life from join to leave."""
