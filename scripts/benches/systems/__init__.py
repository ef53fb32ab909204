"""The same work trained by different systems: the product, and those it is compared with. Each has a file here."""

from __future__ import annotations

from benches.systems import alone, ddp, hivemind_optimizer, ours, torchft_diloco
from benches.systems.system import Setup, System

__all__ = ["SYSTEMS", "Setup", "System"]

SYSTEMS: dict[str, System] = {
    system.name: system
    for module in (alone, ours, ddp, hivemind_optimizer, torchft_diloco)
    for system in module.SYSTEMS
}
