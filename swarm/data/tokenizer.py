"""The run's tokenizer: our own "bytes", or any Hugging Face one.

"bytes" maps byte b of the UTF-8 text to token b and has one more token, 256, the end of a document. It needs no file
and no download, fits every language, keeps small models' embeddings small, and makes nats a token equal nats a byte.
It is made from parts of the `tokenizers` library, so an exported model works with plain `AutoTokenizer`.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from swarm.config import RunConfig
from swarm.errors import ConfigError

BYTES = "bytes"
EOS = "<eos>"
EOS_ID = 256


def load_tokenizer(run: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `run.tokenizer`: "bytes", a folder, or a hub id (its newest revision).

    It always has an end-of-text token. Raises ConfigError: no such folder or hub id, not a tokenizer, hub out of
    reach, no end-of-text token.
    """
    if run.tokenizer == BYTES:
        return byte_tokenizer()
    folder = Path(run.tokenizer).expanduser()
    is_path = run.tokenizer.startswith((".", "/", "~", "\\")) or run.tokenizer.count("/") > 1
    if is_path and not folder.is_dir():
        raise ConfigError(
            f"no tokenizer folder {folder}", why="it does not exist", do="check `tokenizer` in the run config"
        )
    try:
        # trust_remote_code=False also keeps transformers from asking on the terminal whether to run somebody's code
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else run.tokenizer,
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(
            f"cannot load the tokenizer {run.tokenizer!r}",
            why=(str(error) or type(error).__name__).splitlines()[0],
            do='check `tokenizer` in the run config: "bytes", a folder with tokenizer.json, or a hub id (internet)',
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer {run.tokenizer!r} has no end-of-text token",
            why="documents are packed one after the other, and something must part them",
            do="set eos_token in its tokenizer_config.json, or use another tokenizer",
        )
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token b is byte b (0-255), 256 is "<eos>". `decode(encode(x)) == x` for every text, "<eos>" in it included."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())} | {EOS: EOS_ID}
    # Byte-level BPE without a single merge. use_regex=False: the text must not be cut into words first
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        eos_token=EOS,
        split_special_tokens=True,  # "<eos>" written in a text is five bytes, not the end of it
        clean_up_tokenization_spaces=False,  # else decode() turns "do n't" into "don't"
    )


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether token ids are the bytes themselves, so that text can be turned into ids without the tokenizer.

    Also true for one that was exported and loaded again.
    """
    return len(tokenizer) == EOS_ID + 1 and tokenizer.eos_token == EOS and tokenizer.eos_token_id == EOS_ID


def text_bytes(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    """Bytes of text that these tokens stand for. Each of a byte tokenizer's counts as one, the end of a text too."""
    if is_byte_tokenizer(tokenizer):
        return len(ids)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return len(text.encode())


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's table, fixed in `tokenizers`)."""
    printable = {*range(0x21, 0x7E + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    characters, others = [], 0
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(256 + others))
            others += 1
    return characters
