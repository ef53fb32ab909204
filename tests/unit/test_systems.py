"""The systems that the benchmarks compare, as far as no process is needed: commands, lines, settings, bookkeeping."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from swarm.config import load_run
from tests.swarm.support import write_run

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from benches.systems import SYSTEMS, Setup, process
from benches.systems.hivemind_optimizer import Contributions
from benches.systems.system import run_file
from benches.systems.torchft_diloco import fragment_modules, steps_per_fragment
from benches.systems.workload import Workload, held_out

NAMES = ["alone", "swarm", "ddp-fp32", "ddp-bf16", "hivemind", "torchft"]
IPS = ["10.0.0.1", "10.0.0.2"]
JOIN = ["/ip4/10.0.0.1/tcp/31337/p2p/12D3"]


def setup_of(tmp_path: Path, **changes: object) -> Setup:
    (tmp_path / "source").mkdir(exist_ok=True)
    setup = Setup(write_run(tmp_path / "source"), 2, 9_000, tmp_path / "swarm", seed=7)
    return dataclasses.replace(setup, **changes)  # type: ignore[arg-type]


def test_all_systems_are_there_and_say_what_was_chosen() -> None:
    assert list(SYSTEMS) == NAMES
    for name, system in SYSTEMS.items():
        assert system.name == name and system.settings and "\n" not in system.settings


@pytest.mark.parametrize("name", NAMES)
def test_commands_name_the_run_the_peer_and_its_own_address(name: str, tmp_path: Path) -> None:
    setup, system = setup_of(tmp_path), SYSTEMS[name]
    first, second = (system.command(setup, number, IPS, JOIN) for number in (0, 1))
    assert first[0] == second[0] == sys.executable
    assert str(tmp_path / "swarm" / "run.yaml") in first
    assert "--until-tokens" in second and "9000" in second
    if name == "swarm":
        assert "--new-swarm" in first and "/ip4/10.0.0.1/tcp/31337" in first
        assert "/ip4/10.0.0.2/tcp/31338" in second
        assert second[second.index("--initial-peers") + 1] == JOIN[0] and "--run" not in second
    else:
        assert Path(second[1]).is_file()
        options = second[second.index("--number"):]
        assert options[1] == "1" and options[2:5] == ["--ips", *IPS]
        assert str(system.weights(setup, 1)) in options


@pytest.mark.parametrize("name", NAMES)
def test_without_a_limit_the_run_says_when_to_end(name: str, tmp_path: Path) -> None:
    command = SYSTEMS[name].command(setup_of(tmp_path, until_tokens=None), 0, IPS, JOIN)
    assert "--until-tokens" not in command


def test_only_torchft_has_a_helper_and_it_is_on_the_first_host(tmp_path: Path) -> None:
    helpers = {name: system.helpers(setup_of(tmp_path), IPS) for name, system in SYSTEMS.items()}
    assert [name for name in NAMES if helpers[name]] == ["torchft"]
    ((host, argv),) = helpers["torchft"]
    assert host == 0 and argv[argv.index("--min_replicas") + 1] == "1"


def test_a_missing_rival_is_a_reason_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "bench" in SYSTEMS["torchft"].available() and SYSTEMS["hivemind"].available()
    assert not SYSTEMS["alone"].available() and not SYSTEMS["ddp-fp32"].available()


def test_the_run_travels_with_the_setups_seed(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    (tmp_path / "small").mkdir()
    small = write_run(tmp_path / "small", train={"learning_rate": 0.00001, "betas": [0.9, 0.99]})
    for source in (setup.run, small):
        setup = dataclasses.replace(setup, run=source)
        assert load_run(run_file(setup)) == dataclasses.replace(load_run(source), seed=7)


def test_listing_the_systems_does_not_wait_for_torch() -> None:
    code = "import sys, benches.systems; print([m for m in ('torch', 'hivemind', 'torchft') if m in sys.modules])"
    scripts = str(Path(__file__).parents[2] / "scripts")
    environment = {**os.environ, "PYTHONPATH": f"{scripts}{os.pathsep}{Path(scripts).parent}"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "[]", result.stderr


def test_lines_go_on_while_a_peer_waits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "INTERVAL_S", 0.02)
    lines = process.Lines()
    lines.ready()
    lines.tokens, lines.swarm_tokens = 10, 20
    time.sleep(0.2)
    lines.left("done")
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == {"event": "ready"} and printed[-1] == {"event": "left", "reason": "done"}
    progress = printed[1:-1]
    assert len(progress) >= 3 and {line["event"] for line in progress} == {"progress"}
    assert progress[-1]["tokens"] == 10 and progress[-1]["swarm_tokens"] == 20
    assert abs(progress[-1]["time"] - time.time()) < 5


def test_a_peer_finds_the_interface_of_its_address() -> None:
    assert process.interface_of("127.0.0.1").startswith("lo")
    with pytest.raises(SystemExit, match=r"192\.0\.2\.1"):
        process.interface_of("192.0.2.1")


def test_waiting_has_an_end() -> None:
    assert process.within(5.0, lambda: None)
    assert not process.within(0.05, lambda: time.sleep(0.5))
    assert not process.within(5.0, lambda: 1 // 0)


@pytest.mark.parametrize(("tokens", "peers", "steps"), [(12_000, 2, 2), (80_000, 2, 10), (80_000, 4, 5), (10, 4, 1)])
def test_torchft_syncs_every_fragment_once_a_round(tokens: int, peers: int, steps: int) -> None:
    assert steps_per_fragment(tokens, fragments=4, step_tokens=1_000, num_peers=peers) == steps


def test_hiveminds_tokens_count_once_they_are_averaged() -> None:
    books = Contributions()
    books.pending = 100
    offer = books.offered()
    books.pending += 50  # trained between matchmaking and the round: in the weights, counted by the next round
    books.succeeded({"a": offer, "b": 300}, offer)
    assert books.swarm_tokens == 400 and books.pending == 50 and books.offered() == 150
    books.lost()
    books.pending += 10
    books.succeeded({"a": books.offered(), "c": 5}, books.offered())
    assert books.swarm_tokens == 110 + 300 + 5 and books.rounds == 2 and books.pending == 0


def test_the_work_is_the_runs_and_its_weights_can_be_judged(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    run = load_run(run_file(setup))
    work = Workload(setup.folder / "run.yaml", number=0, until_tokens=setup.until_tokens)
    assert work.end_tokens == 9_000 and work.step_tokens == 128
    file = setup.folder / "weights.safetensors"
    work.save(file)
    before = held_out(run, file)
    for step in range(30):
        work.step(step * work.step_tokens)
    work.save(file)
    assert held_out(run, file) < before - 0.5
    names = {name for name, _ in work.model.named_parameters()}
    assert set(load_file(file)) == names
    modules = fragment_modules(work)
    theirs = [parameter for module in modules for parameter in module.parameters()]
    assert len(modules) == run.fragments and {id(p) for p in theirs} == {id(p) for p in work.model.parameters()}


def test_peers_read_the_same_text_in_other_orders(tmp_path: Path) -> None:
    file = run_file(setup_of(tmp_path))
    works = [Workload(file, number=number, until_tokens=None) for number in (0, 0, 1)]
    for work in works:
        work.gradients()
    first, same, other = (work.inner.parameters["lm_head.weight"].grad for work in works)
    assert first is not None and same is not None and other is not None
    assert torch.equal(first, same) and not torch.equal(first, other)
