"""How the scripts start and end: as the package's own small programs do."""

from swarm.program import guarded, start

__all__ = ["guarded", "start"]
