"""Rounds: how the peers that hold a fragment agree on its next version. Read `round.py` first."""
