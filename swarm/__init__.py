"""swarm: people with ordinary computers on ordinary links train a language model together. See swarm/README.md."""

__version__ = "0.1.0"
