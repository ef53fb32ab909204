"""The documents a run trains on and the ones it never sees, as two Hugging Face data sets.

Which document is held out depends on nothing but its name (SHA-256), so all peers agree without talking, whatever
order their files come in and however many of them they have. What a peer measures on held-out text is then honest for
the whole swarm: no other peer trained on it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from datasets import Dataset, Features, Value, load_dataset

from swarm.config import DataConfig
from swarm.data.files import Document, missing_field, read_files
from swarm.data.stdlib import standard_library
from swarm.errors import ConfigError

# large_string: a column of more than 2 GB does not fit Arrow's 32-bit offsets
FEATURES = Features({"name": Value("string"), "text": Value("large_string")})


def documents(data: DataConfig | None, *, cache: Path | None = None) -> tuple[Dataset, Dataset]:
    """(train, held_out), map-style, in memory, columns `name` and `text`; empty documents are left out.

    A document is held out when sha256(name) % 10000 < held_out_percent * 100. Where that leaves either side empty (one
    long file, a handful of rows) each document's *text* is split instead: its last `held_out_percent` (one character
    at least) is held out, under the same name.

    `cache`: folder for what `hub` downloads (default: Hugging Face's own). Nothing else is written.
    Raises ConfigError: sources that cannot be read, no field `text_field`, no text at all, too little to split.
    """
    if data is None:
        raise ConfigError(
            "this run has several sources, and no one text", why="it has `sources` instead of `data`",
            do="use a run with `data` here",
        )
    if data.stdlib:
        found = standard_library()
    elif data.files:
        found = read_files(data.files, text_field=data.text_field)
    else:
        found = _hub(data, cache)
    found = [(name, text) for name, text in found if text]
    if not found:
        raise ConfigError("the data holds no text", why="every document is empty", do="check `data` in the run config")
    train, held_out = split(found, held_out_percent=data.held_out_percent)
    return _dataset(train), _dataset(held_out)


def is_held_out(name: str, *, held_out_percent: float) -> bool:
    """Whether the document of that name is never trained on; the same answer on every machine."""
    number = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest(), "big")
    return number % 10_000 < held_out_percent * 100


def split(found: list[Document], *, held_out_percent: float) -> tuple[list[Document], list[Document]]:
    """(train, held_out), by name, or within each document where that leaves a side empty. Raises ConfigError."""
    train: list[Document] = []
    held_out: list[Document] = []
    for name, text in found:
        (held_out if is_held_out(name, held_out_percent=held_out_percent) else train).append((name, text))
    if train and held_out:
        return train, held_out
    train, held_out = [], []
    for name, text in found:
        cut = len(text) - max(1, round(len(text) * held_out_percent / 100))
        train.append((name, text[:cut]))
        held_out.append((name, text[cut:]))
    train = [document for document in train if document[1]]
    if not train:
        raise ConfigError(
            "the data is too short to hold some of it out", why="no document has two characters", do="use more text"
        )
    return train, held_out


def _dataset(found: list[Document]) -> Dataset:
    return Dataset.from_dict(
        {"name": [name for name, _ in found], "text": [text for _, text in found]}, features=FEATURES
    )


def _hub(data: DataConfig, cache: Path | None) -> list[Document]:
    source = str(data.hub)
    try:
        dataset = load_dataset(
            source,
            data.subset,
            split=data.split,
            revision=data.revision,
            cache_dir=None if cache is None else str(cache),
        )
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # offline, unknown id / subset / split, needs a script or a login
        raise ConfigError(
            f"cannot load the data set {source!r} from the hub",
            why=(str(error) or type(error).__name__).splitlines()[0],
            do="check data.hub, subset, split and revision, and the internet connection; for data sets with a loading "
            "script try revision: refs/convert/parquet",
        ) from None
    fields = dataset.column_names
    if data.text_field not in fields:
        raise missing_field(f"data set {source}", data.text_field, ", ".join(fields))
    texts = dataset[data.text_field]
    if (
        not isinstance(dataset.features[data.text_field], Value)
        or "string" not in dataset.features[data.text_field].dtype
    ):
        raise ConfigError(
            f"data set {source}: {data.text_field!r} is not text",
            why=f"it is {dataset.features[data.text_field]}",
            do="set text_field to a field of strings",
        )
    prefix = "/".join(part for part in (source, data.subset, data.split) if part)
    return [(f"{prefix}#{row}", text or "") for row, text in enumerate(texts)]
