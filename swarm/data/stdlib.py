"""The running Python's standard library as training text: about 10 MB of code and prose on every machine, no download.

Why it exists: a demo swarm must train on something real without internet, licences or a shared folder.
Peers with different Python versions read slightly different text. That is harmless: training data need not agree,
and the held-out side is chosen by document *name* (`swarm/data/sources.py`), so no peer trains on what another
one holds out under the same name.
"""

from __future__ import annotations

import importlib
import os
import sysconfig
from pathlib import Path

from swarm.errors import ConfigError

SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "__pycache__",  # tests: 20 MB of repetitive code
        "site-packages",
        "dist-packages",  # not the standard library, and different on each machine
        "encodings",
        "lib2to3",
        "idlelib",  # tables of numbers; an old copy of the parser; a program, not a library
        "pydoc_data",  # read below, one document a topic
        "lib-dynload",
    }
)


def standard_library(folder: Path | None = None) -> list[tuple[str, str]]:
    """(name, text) of each module and documentation topic, sorted by name.

    `folder`: where the library lives; default: the running Python's. Names are relative and use "/" on every system:
    "stdlib/asyncio/locks.py", "topics/assert". Files that cannot be read or are not UTF-8 are skipped.
    Raises ConfigError where this Python has no library on disk (a zipped one, for instance).
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    documents = _modules(root)
    if not documents:
        raise ConfigError(
            f"the Python standard library is not at {root}",
            why="this Python was installed without its .py files, or with them in a zip file",
            do="use another Python, or a run whose data is `files` or `hub`",
        )
    documents += _topics()
    return sorted(documents)


def _modules(root: Path) -> list[tuple[str, str]]:
    found = []
    for parent, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        for name in files:
            # _sysconfigdata holds the paths of the machine Python was built on: nothing worth learning
            if not name.endswith(".py") or name.startswith("_sysconfigdata"):
                continue
            path = Path(parent, name)
            try:
                text = path.read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # a few modules are latin-1 on purpose; a broken link must not stop a run
            found.append((f"stdlib/{path.relative_to(root).as_posix()}", text))
    return found


def _topics() -> list[tuple[str, str]]:
    """The language reference as plain text, what `help("assert")` prints. Some distributions leave it out."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        return []
    return [(f"topics/{name}", text) for name, text in topics.items()]
