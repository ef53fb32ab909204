"""Data sets of the Hugging Face hub, row by row: kept on disk, or streamed.

`datasets` 4 and later runs no loading scripts, so data sets that had one are read from the parquet files that the hub
makes of them (revision refs/convert/parquet); `REPLACED` says what to write for those of the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

from swarm.config import SourceConfig
from swarm.errors import ConfigError, NetworkError

PARQUET = "refs/convert/parquet"
PILE = "hub: EleutherAI/the_pile_deduplicated (parquet), or monology/pile-uncopyrighted (jsonl.zst)"
REPLACED = {
    "the_pile": PILE,
    "eleutherai/the_pile": PILE,
    "eleutherai/pile": PILE,
    "bigscience/p3": f"revision: {PARQUET}, with files: ['*/train/*.parquet'] for all of its tasks, or one subset",
    "muennighoff/p3": "its split train is one zip of 16.5 GB, which cannot be streamed: unpack it and name `files`",
    "muennighoff/natural-instructions": f"it loads as it is; or revision: {PARQUET}",
    "allenai/natural-instructions": "it is a repository of GitHub: clone it and name its folder in `files`",
    "kaist-ai/cot-collection": f"revision: {PARQUET}",
    "open-orca/flan": "its chains of thought: files: [cot_fsopt_data/*, cot_zsopt_data/*], format: cot",
    "ought/raft": f"revision: {PARQUET} and a subset",
}
"""hub id in lower case -> what to write in the run file"""


def open_rows(source: SourceConfig, cache: Path | None) -> list[Iterator[dict[str, Any]] | Any]:
    """What holds the rows, part by part, the same order everywhere: iterable again and again. One part where the data
    set is kept; where it is streamed each of its files.

    Raises ConfigError: no such data set, subset or split, one with a script. NetworkError: out of reach.
    """
    hub = str(source.hub)
    try:
        found = load_dataset(
            hub, source.subset, split=source.split, revision=source.revision, streaming=source.streaming,
            data_files=source.files or None, cache_dir=None if cache is None else str(cache),
        )
    except (DatasetNotFoundError, ValueError, RuntimeError, NotImplementedError) as error:
        raise _refused(source, error) from None
    except (OSError, EOFError) as error:
        raise NetworkError(
            f"the data set {hub!r} cannot be reached", why=_line(error), do="check the internet connection"
        ) from None
    if isinstance(found, IterableDataset):
        return [found.shard(num_shards=found.num_shards, index=index) for index in range(found.num_shards)]
    return [found]


def _refused(source: SourceConfig, error: Exception) -> ConfigError:
    if "zstd not supported" in str(error):
        return ConfigError(
            f"the data set {source.hub!r} is packed with zstandard", why="`datasets` needs a package to unpack it",
            do="pip install zstandard",
        )
    advice = REPLACED.get(str(source.hub).lower())
    general = "check hub, subset, split and revision; for data sets with a loading script try revision: " + PARQUET
    return ConfigError(
        f"cannot load the data set {source.hub!r} from the hub", why=_line(error),
        do=f"{general}. For this one: {advice}" if advice else general,
    )


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
