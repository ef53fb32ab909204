"""Where the ready-made configs (`peers/` in the source) are on this computer.

In a checkout, and in one installed with `pip install -e`, they lie beside the package; in a wheel, inside it, as
`swarm/presets` (see package_dir in setup.cfg). So `python -m swarm.peer --new-swarm` finds its demo run anywhere.
"""

from __future__ import annotations

from pathlib import Path

from swarm.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent.parent


def preset_path(relative: str, *, package: Path = _PACKAGE) -> Path:
    """The file `relative` ("runs/demo.yaml") among the ready-made configs. Raises ConfigError with those there are."""
    folders = [package / "presets", package.parent / "peers"]
    for folder in folders:
        if (path := folder / relative).is_file() and path.resolve().is_relative_to(folder.resolve()):
            return path
    known = sorted({str(file.relative_to(folder)) for folder in folders for file in folder.rglob("*.yaml")})
    raise ConfigError(
        f"there is no ready-made config {relative}",
        why=f"there are: {', '.join(known)}" if known else "this installation carries none",
        do="choose one of these, or give a file of your own" if known else "install again, from a whole checkout",
    )
