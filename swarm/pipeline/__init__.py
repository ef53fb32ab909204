"""Stages: which fragments a peer holds (`placement.py`), and how microbatches pass through them (`chain.py`)."""
