"""What machines compute with: the known ones, what is said of others, and what is refused."""

from __future__ import annotations

import math

import pytest

from swarm.errors import ConfigError
from swarm.train.hardware import CPU, GIB, KNOWN, REST_WATTS, UTILISATION, computer_of


def test_the_smallest_known_gpu_with_the_memory_is_assumed() -> None:
    assert [computer_of(None, gpu_bytes=size * 10**9).name for size in (6, 8, 12, 24)] == [
        "rtx-3060-laptop", "rtx-4060", "rtx-3060", "rtx-3090",
    ]
    assert computer_of(None, gpu_bytes=0) is CPU
    with pytest.raises(ConfigError, match="no GPU is known here with 200 GB") as caught:
        computer_of(None, gpu_bytes=200 * 10**9)
    assert "--flops" in caught.value.do


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_is_plausible(name: str) -> None:
    computer = KNOWN[name]
    assert computer_of(name, gpu_bytes=0) == computer
    assert computer.bf16_flops >= 1.9 * computer.fp32_flops > 1e13 and computer.gpu_bytes % GIB == 0
    assert REST_WATTS + 70 < computer.watts < 1000
    assert 5e9 < computer.bf16_flops / computer.watts < 2e12
    if name.startswith("rtx"):
        assert computer.bf16_flops == pytest.approx(2 * computer.fp32_flops, rel=0.01)


def test_peers_with_bfloat16_weights_use_tensor_cores() -> None:
    computer = KNOWN["rtx-3060"]
    assert computer.flop_per_s(halved=True) == pytest.approx(UTILISATION * 25.5e12)
    assert computer.flop_per_s(halved=False) == pytest.approx(UTILISATION * 12.7e12)


def test_who_plans_knows_better() -> None:
    mine = computer_of("rtx-3060", gpu_bytes=0, utilisation=0.5, watts=250.0)
    assert mine.flop_per_s(halved=True) == pytest.approx(0.5 * 25.5e12) and mine.watts == 250
    stated = computer_of(None, gpu_bytes=12 * 10**9, flops=1e13, utilisation=0.1)
    assert stated.flop_per_s(halved=True) == stated.flop_per_s(halved=False) == 1e13, "that is what it gets done"
    assert stated.watts == KNOWN["rtx-3060"].watts and stated.name == "a GPU"
    assert computer_of(None, gpu_bytes=0, utilisation=0.1) is CPU, "measured, not a peak"
    assert computer_of(None, gpu_bytes=0, flops=1e12).name == "cpu"


def test_an_unknown_gpu_names_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match="no GPU called 'rtx-9999'") as caught:
        computer_of("rtx-9999", gpu_bytes=0)
    assert "rtx-3060, rtx-4070" in caught.value.do


@pytest.mark.parametrize("wrong", [
    {"flops": 0.0}, {"flops": -1e12}, {"flops": math.nan}, {"flops": math.inf}, {"utilisation": 0.0},
    {"utilisation": 1.5}, {"utilisation": -0.1}, {"utilisation": math.nan}, {"watts": -1.0}, {"watts": math.nan},
])
def test_impossible_figures_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(wrong))}"):
        computer_of("rtx-3060", gpu_bytes=0, **wrong)
