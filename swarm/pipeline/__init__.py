"""Stages: microbatches travel from peer to peer, and their gradients come back. Read `chain.py` first."""
