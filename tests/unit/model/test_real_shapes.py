"""GPT-J-6B's checkpoint in its real shapes: a peer with a part of it reads the bytes of that part, and no others.

The files have holes where the values would be: 12 GB of bfloat16 in two files, or 24 GB of fp32 in three, take no disk.
As old ones do, they also hold mask tables, which no model of today has.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from swarm.config import DataConfig, ModelConfig, RunConfig
from swarm.model import weights
from swarm.model.architecture import architecture
from swarm.model.skeleton import skeleton_of, tensors
from swarm.model.stage import Stage
from swarm.model.weights import INDEX, Checkpoint, read

GPT_J: dict[str, Any] = {
    "model_type": "gptj", "n_layer": 28, "n_embd": 4096, "n_head": 16, "rotary_dim": 64, "n_positions": 2048,
    "vocab_size": 50400, "bos_token_id": 50256, "eos_token_id": 50256, "tie_word_embeddings": False,
}
NUM_PARAMETERS = 6_050_882_784
BLOCK = 4 * 4096**2 + 2 * 4096 * 16384 + 16384 + 3 * 4096
IO = Path("/proc/self/io")
SIZE = {"BF16": 2, "F32": 4, "U8": 1}


def shapes() -> dict[str, tuple[str, list[int]]]:
    """name in the file -> (type, shape); "" stands for the checkpoint's own type"""
    def block(index: int) -> dict[str, tuple[str, list[int]]]:
        at = f"transformer.h.{index}"
        square = {f"{at}.attn.{name}_proj.weight": ("", [4096, 4096]) for name in ("k", "v", "q", "out")}
        return {
            f"{at}.ln_1.weight": ("", [4096]), f"{at}.ln_1.bias": ("", [4096]),
            f"{at}.attn.bias": ("U8", [1, 1, 2048, 2048]), f"{at}.attn.masked_bias": ("", []), **square,
            f"{at}.mlp.fc_in.weight": ("", [16384, 4096]), f"{at}.mlp.fc_in.bias": ("", [16384]),
            f"{at}.mlp.fc_out.weight": ("", [4096, 16384]), f"{at}.mlp.fc_out.bias": ("", [4096]),
        }

    found: dict[str, tuple[str, list[int]]] = {"transformer.wte.weight": ("", [50400, 4096])}
    for index in range(28):
        found |= block(index)
    last = {"transformer.ln_f.weight": [4096], "transformer.ln_f.bias": [4096], "lm_head.weight": [50400, 4096]}
    return found | {name: ("", shape) for name, shape in {**last, "lm_head.bias": [50400]}.items()}


def checkpoint(folder: Path, dtype: str, num_files: int) -> int:
    """Writes it; returns the bytes that the files would have without holes."""
    files: list[dict[str, tuple[str, list[int]]]] = [{} for _ in range(num_files)]
    names = list(shapes().items())
    for position, (name, (kind, shape)) in enumerate(names):
        files[position * num_files // len(names)][name] = (kind or dtype, shape)
    index: dict[str, str] = {}
    total = 0
    for number, content in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{num_files:05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (kind, shape) in content.items():
            start, end = end, end + SIZE[kind] * torch.Size(shape).numel()
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
            index[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
        total += 8 + len(text) + end
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(GPT_J))
    return total


def read_bytes() -> int:
    """That this process has read so far, through system calls; 0 where the system does not say."""
    if not IO.exists():
        return 0
    return int(IO.read_text().split("rchar: ")[1].split()[0])


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """name of a tensor -> bytes of it that were asked for"""
    found: dict[str, int] = {}

    class File:
        def __init__(self, path: Path, **options: Any) -> None:
            self._file = safe_open(path, **options)

        def __enter__(self) -> File:
            return self

        def __exit__(self, *_: Any) -> None:
            return None

        def get_tensor(self, name: str) -> torch.Tensor:
            tensor: torch.Tensor = self._file.get_tensor(name)
            found[name] = tensor.numel() * tensor.element_size()
            return tensor

    monkeypatch.setattr(weights, "safe_open", File)
    return found


def held_by(part: tuple[int, int]) -> tuple[Any, set[str]]:
    """The whole model without memory, and what a stage of these blocks holds of it."""
    run = RunConfig(name="test", model=ModelConfig(config=GPT_J), data=DataConfig(stdlib=True), fragments=28)
    whole = skeleton_of(architecture(run))
    names = {name for name, _ in tensors(Stage(skeleton_of(architecture(run)).model, *part).model)}
    return whole.model, names


@pytest.mark.parametrize(("dtype", "num_files", "total"), [("BF16", 2, 12.2e9), ("F32", 3, 24.3e9)])
def test_a_block_costs_its_own_bytes(
    dtype: str, num_files: int, total: float, tmp_path: Path, fetched: dict[str, int]
) -> None:
    size = checkpoint(tmp_path, dtype, num_files)
    assert size == pytest.approx(total, rel=0.01)
    on_disk = sum(os.stat(path).st_blocks * 512 for path in tmp_path.iterdir())
    assert on_disk < 1_000_000, "holes take no disk"
    model, names = held_by((13, 14))
    if dtype == "F32":  # the large matrices once, in bfloat16: they are a gigabyte
        names = {name for name in names if ".mlp." not in name or name.endswith("bias")}
    before = read_bytes()
    found = read(Checkpoint(str(tmp_path)), model, names)
    took = read_bytes() - before
    wanted = sum(tensor.numel() for tensor in found.values())
    assert sum(fetched.values()) == SIZE[dtype] * wanted
    assert set(fetched) == set(found) == {name for name in names if name in shapes()}
    if dtype == "BF16":
        assert wanted == BLOCK
    if IO.exists():
        assert SIZE[dtype] * wanted <= took < SIZE[dtype] * wanted + 500_000, "the headers of the files, and the index"
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


def test_the_shapes_are_those_of_the_model() -> None:
    """Each parameter is in the file; what else is there (mask tables) belongs to no part."""
    model, _ = held_by((0, 28))
    stored = {name: tuple(shape) for name, (_, shape) in shapes().items()}
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sum(p.numel() for p in model.parameters()) == NUM_PARAMETERS
    assert parameters.items() <= stored.items()
    assert {name.rpartition(".")[2] for name in stored.keys() - parameters.keys()} == {"bias", "masked_bias"}


def test_files_without_anything_needed_are_not_even_opened(tmp_path: Path, fetched: dict[str, int]) -> None:
    checkpoint(tmp_path, "BF16", 3)
    for path in sorted(tmp_path.glob("*.safetensors"))[1:]:
        path.unlink()
    model, _ = held_by((0, 1))
    found = read(Checkpoint(str(tmp_path)), model, {"transformer.h.0.ln_1.weight", "transformer.h.1.ln_1.bias"})
    assert len(found) == 2 and sum(fetched.values()) == 2 * 2 * 4096
