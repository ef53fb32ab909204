"""Asking a model: of an export, of a checkpoint, or of a live swarm."""
