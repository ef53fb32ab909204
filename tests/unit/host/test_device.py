"""Devices and free memory: every choice has its reason, every refusal its way out."""

import psutil
import pytest
import torch

from swarm.errors import ConfigError
from swarm.host.device import available_bytes, choose_device, memory_line

CPU = torch.device("cpu")
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this computer has a CUDA device")
no_mps = pytest.mark.skipif(torch.backends.mps.is_available(), reason="this computer has an Apple GPU")


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_cpu_is_always_there():
    device, reason = choose_device("cpu", 0)
    assert device == CPU
    assert reason == f"CPU, {torch.get_num_threads()} threads (--device cpu)"


def test_threads_are_set_and_shown():
    _, reason = choose_device("cpu", 1)
    assert torch.get_num_threads() == 1
    assert "1 threads" in reason


def test_zero_threads_leaves_torch_as_it_is():
    torch.set_num_threads(1)
    assert choose_device("cpu", 0)[1].startswith("CPU, 1 threads")
    assert torch.get_num_threads() == 1


def test_the_cpu_with_a_number_is_the_cpu():
    assert choose_device("cpu:0", 0) == (CPU, f"CPU, {torch.get_num_threads()} threads (--device cpu:0)")


def test_auto_gives_a_device_that_computes_and_says_why():
    device, reason = choose_device("auto", 0)
    assert torch.ones(2, device=device).sum().item() == 2
    assert reason.endswith(")")


@no_cuda
@no_mps
def test_auto_on_a_computer_without_gpu_says_why_it_took_the_cpu():
    device, reason = choose_device("auto", 0)
    assert device == CPU
    assert "without CUDA" in reason or "no CUDA device" in reason


@no_cuda
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_an_absent_gpu_is_a_usage_error_that_shows_the_way_out(name):
    with pytest.raises(ConfigError) as caught:
        choose_device(name, 0)
    assert name in caught.value.what
    assert "CUDA" in caught.value.why
    assert "--device auto" in caught.value.do


@no_mps
def test_an_absent_apple_gpu_is_a_usage_error():
    with pytest.raises(ConfigError, match="--device mps"):
        choose_device("mps", 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_taken_and_one_too_many_is_not():
    device, reason = choose_device("cuda:0", 0)
    assert device == torch.device("cuda:0") and torch.cuda.get_device_name(0) in reason
    assert "GPU" in memory_line(device)
    with pytest.raises(ConfigError) as caught:
        choose_device(f"cuda:{torch.cuda.device_count()}", 0)
    assert "cuda:0" in caught.value.why


def test_free_memory_is_no_more_than_there_is():
    assert 0 < available_bytes() <= psutil.virtual_memory().total
    assert memory_line().endswith(" free")
    assert memory_line() == memory_line(CPU) or " of " in memory_line(CPU)
