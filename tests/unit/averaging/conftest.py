"""Small worlds for averaging: one thread for torch, a run config, a layout of three tensors, signed commits."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from swarm.averaging import plan
from swarm.averaging.layout import Layout, layout_of
from swarm.averaging.messages import (
    Commit,
    Contributor,
    Opening,
    Part,
    PartResult,
    make_commit,
    result_message,
)
from swarm.config import AveragingConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from swarm.model.fragments import FragmentSpec, TensorSpec
from swarm.network.keys import Keypair
from tests.unit.averaging.four_peers import Tell, play_four

torch.set_num_threads(1)

KEYS = [Keypair(bytes([i]) * 32) for i in range(1, 9)]


@pytest.fixture
def keys() -> list[Keypair]:
    return KEYS


@pytest.fixture
def make_run() -> Callable[..., RunConfig]:
    def make(train: dict[str, Any] | None = None, **averaging: Any) -> RunConfig:
        return RunConfig(
            name="test", model=ModelConfig(config={"model_type": "gptj"}), data=DataConfig(stdlib=True),
            train=TrainConfig(**(train or {})), averaging=AveragingConfig(**averaging),
        )

    return make


@pytest.fixture
def layout() -> Layout:
    """One fine block and two coarse ones, all with padding."""
    return layout_of(FragmentSpec(0, (0, 1), (
        TensorSpec("bias", (10,), fine=True), TensorSpec("matrix", (20, 15), fine=False),
        TensorSpec("norm", (7,), fine=True),
    )))


@pytest.fixture
def signed_commit() -> Callable[..., Commit]:
    """A commit with everything signed by those who should have: `members` are indices into KEYS, the opener first."""
    def make(
        *, members: tuple[int, ...] = (0, 1, 2), edges: tuple[int, ...] = (0, 2, 5), owners: tuple[int, ...] = (0, 1),
        tokens: dict[int, int] | None = None, version: int = 4, base: str = "b" * 64, nonce: int = 0,
        push_s: float = 7.25, contents: tuple[bytes, ...] = (b"one", b"two"), fragment: int = 1,
        result_keys: tuple[int, ...] | None = None, opener_key: int | None = None,
    ) -> Commit:
        parts = [
            Part(start=start, end=end, owner=owner)
            for start, end, owner in zip(edges[:-1], edges[1:], owners, strict=True)
        ]
        opening = Opening(
            fragment=fragment, version=version, base=base, members=[KEYS[m].peer_id for m in members], parts=parts,
            nonce=f"{nonce:016x}", push_s=push_s,
        )
        contributors = [Contributor(member=m, tokens=t) for m, t in (tokens or {0: 100, 2: 50}).items()]
        results = []
        for index, (part, content) in enumerate(zip(parts, contents, strict=True)):
            key = KEYS[members[part.owner] if result_keys is None else result_keys[index]]
            digest = hashlib.sha256(content).hexdigest()
            signature = key.sign(result_message(opening.id, index, contributors, digest)).hex()
            results.append(PartResult(hash=digest, signature=signature))
        return make_commit(KEYS[members[0] if opener_key is None else opener_key], opening, contributors, results)

    return make


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread takes real time, in which a made-up clock would jump ahead."""
    async def at_once(function: Callable[..., object], *arguments: object) -> object:
        return function(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", at_once)


@pytest.fixture
def small_pieces(no_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners have several parts, as in a large model."""
    monkeypatch.setattr(plan, "MIN_PIECE_BLOCKS", 1)


@pytest.fixture
def tell(make_run: Callable[..., RunConfig], layout: Layout, keys: list[Keypair], no_threads: None) -> Tell:
    """Play a story of four peers."""
    run = make_run({"total_tokens": 10**9}, bits=8, tokens_per_round=1000)
    return lambda story: play_four(run, layout, keys, story)
