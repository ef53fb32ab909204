"""python -m swarm.plan: GPT-J on usual machines, with and without adapters, and what it says to nonsense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from swarm import plan
from swarm.config import load_run
from swarm.errors import ConfigError
from swarm.host.presets import preset_path
from swarm.plan import KNOWN, machine_of

GPT_J = 6_050_882_784
SMALL = {
    "model_type": "gptj", "n_layer": 4, "n_embd": 64, "n_head": 4, "rotary_dim": 16, "n_positions": 64,
    "vocab_size": 260, "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip


def document(**model: Any) -> dict[str, Any]:
    return {
        "name": "gpt-jt", "model": {"source": "EleutherAI/gpt-j-6B", **model}, "data": {"stdlib": True},
        "fragments": 28,
        "train": {"sequence_length": 2048, "batch_sequences": 16, "total_tokens": 3_540_000_000},
        "averaging": {"tokens_per_round": 6_553_600, "outer_momentum": 0.5},
    }  # fmt: skip


def run_file(folder: Path, **changes: Any) -> str:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({**document(), **changes}))
    return str(file)


def planned(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert plan.main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def spans(machine: dict[str, Any]) -> list[list[int]]:
    return [peer["fragments"] for peer in machine["peers"]]


def test_gpt_j_on_the_usual_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned("--run", run_file(tmp_path), capsys=capsys)
    assert found["trained_parameters"] == GPT_J and found["rounds"] == 541
    small, eight, twelve, large = found["machines"]
    for machine in found["machines"]:
        held = [index for first, end in spans(machine) for index in range(first, end)]
        assert sorted(held + machine["too_large"]) == list(range(28)), "every fragment once"
        for peer in machine["peers"]:
            assert peer["gpu_bytes"] <= machine["gpu_bytes"] and peer["main_bytes"] <= machine["main_bytes"]
            assert peer["in_flight"] >= 1
    assert len(large["peers"]) <= 4 and len(twelve["peers"]) <= 8 and not twelve["too_large"]
    assert small["too_large"] == [0, 27] and len(small["peers"]) == 26, "embedding and head are a block each"
    assert 27 in eight["too_large"] and "frozen base" not in eight["short_of"]
    # GPT-JT: 633 TB with data parallelism, 12.7 TB as it was trained; ours is below both
    assert found["published"] == {"ddp_bytes": 633e12, "bytes": 12.7e12}
    assert found["ddp_bytes"] == pytest.approx(27_008 * 4 * GPT_J * 0.75, rel=0.01)
    assert max(peer["sent_bytes"] for machine in found["machines"] for peer in machine["peers"]) < 9e12


def test_a_small_gpu_holds_a_share_of_gpt_j_with_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The promise: nf4, adapters only, 6 GB of GPU memory."""
    lora = document(lora={"rank": 16})["model"]
    found = planned("--run", run_file(tmp_path, model=lora), "--memory", "6GB+12GB", "8GB+12GB", capsys=capsys)
    [small, eight] = found["machines"]
    assert found["adapters"] and found["trained_parameters"] == 28 * 16 * (4 * 8192 + 2 * 20480)
    assert small["too_large"] == [] and len(small["peers"]) == 2
    assert max(end - first for first, end in spans(small)) >= 20 and spans(eight) == [[0, 28]]
    table = small["peers"][0]["table"]
    assert "frozen base" in table and "a block that is computed again" in table
    assert found["round_bytes"] < 0.02e9 and small["peers"][0]["averaging_bytes"] < 0.02e12


def test_traffic_is_codec_arithmetic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_file(
        tmp_path, model={"config": SMALL}, fragments=4, train={"sequence_length": 64, "total_tokens": 1_000_000},
        averaging={"tokens_per_round": 100_000, "bits": 32},
    )
    two = planned("--run", file, "--memory", "1GB", "--replicas", "2", capsys=capsys)
    [peer] = two["machines"][0]["peers"]
    assert two["rounds"] == 10 and peer["fragments"] == [0, 4] and peer["pipeline_bytes"] == 0
    padding = 4 * 2 * 256 * 4  # fp32 of each fragment's last blocks, at most
    assert two["round_bytes"] == pytest.approx(4 * two["trained_parameters"], abs=padding)
    assert peer["averaging_bytes"] == 10 * two["round_bytes"], "half to the other, and half of the result"
    alone = planned("--run", file, "--memory", "1GB", "--replicas", "1", capsys=capsys)
    assert alone["machines"][0]["peers"][0]["sent_bytes"] == 0 == alone["ddp_bytes"]


def test_stages_send_hidden_states_on_and_gradients_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_file(
        tmp_path, model={"config": {**SMALL, "n_embd": 256}}, fragments=4, averaging={"bits": 4},
        train={"sequence_length": 64, "batch_sequences": 4, "total_tokens": 1_000_000},
    )
    found = planned("--run", file, "--memory", "870MB", "--replicas", "1", capsys=capsys)
    peers = found["machines"][0]["peers"]
    assert len(peers) > 1 and found["forward_bytes_per_token"] == pytest.approx(256 * (1 + 2 / 256) + 2, rel=0.01)
    back, forward = found["back_bytes_per_token"], found["forward_bytes_per_token"]
    for peer in peers:
        first, end = peer["fragments"]
        assert peer["pipeline_bytes"] == 1e6 * ((forward if end < 4 else 0) + (back if first > 0 else 0))


def test_for_people_it_is_short_and_names_what_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--run", run_file(tmp_path), "--memory", "6GB+28GB", "24GB+56GB"]) == 0
    text = capsys.readouterr().out
    assert "6.1B parameters in 28 fragments" in text and "26 peers, and others for fragments 0, 27" in text
    assert "1:27, 1 fragment each" in text and "24 GB GPU, 56 GB main: 4 peers" in text
    assert "633 TB with data parallelism, 12.7 TB as it was trained" in text
    assert len(text.splitlines()) < 25 and "|" not in text
    assert plan.main(["--run", run_file(tmp_path), "--memory", "24GB+56GB", "--tables"]) == 0
    assert "| weights of graphs under way (GPU)" in capsys.readouterr().out


def test_a_machine_that_is_too_small_sees_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--run", run_file(tmp_path), "--memory", "2GB"]) == 0
    text = capsys.readouterr().out
    assert "CPU, 2 GB: too little for any fragment" in text and "2 GB: too little" in text
    assert "fragment 0 alone would take" in text and "global weights and momentum" in text


def test_the_demo_fits_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned("--run", str(preset_path("runs/demo.yaml")), "--memory", "2GB", capsys=capsys)
    assert spans(found["machines"][0]) == [[0, 4]]


def test_machines_are_read() -> None:
    gpu, cpu = machine_of("6GB+12GB"), machine_of("16GB")
    assert (gpu.gpu_bytes, gpu.main_bytes, gpu.name) == (6 * 10**9, 12 * 10**9, "6 GB GPU, 12 GB main")
    assert (cpu.gpu_bytes, cpu.main_bytes, cpu.name) == (0, 16 * 10**9, "CPU, 16 GB")


@pytest.mark.parametrize("text", ["", "six", "6GB+", "+6GB", "6GB+x", "6+12", "-6GB", "1GB+2GB+3GB", "12"])
def test_nonsense_for_memory_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--memory") as caught:
        machine_of(text)
    assert "6GB+12GB" in caught.value.do


@pytest.mark.parametrize(("arguments", "said"), [
    (["--run", "/nonexistent.yaml"], "cannot read the run config"),
    (["--run", "RUN", "--replicas", "0"], "--replicas must be 1 or more"),
    (["--run", "RUN", "--memory", "much"], "--memory much cannot be understood"),
])
def test_mistakes_end_with_a_stated_error(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [run_file(tmp_path) if argument == "RUN" else argument for argument in arguments]
    assert plan.main(arguments) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_more_fragments_than_blocks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--run", run_file(tmp_path, fragments=29)]) == 2
    assert "cannot cut the model into 29 fragments" in capsys.readouterr().err


def test_known_shapes_leave_the_rest_of_a_run_alone(tmp_path: Path) -> None:
    run = load_run(run_file(tmp_path, model=document(lora={"rank": 2})["model"]))
    found = plan.known(run)
    assert found.model.config == KNOWN["eleutherai/gpt-j-6b"] and found.model.lora == run.model.lora
    assert found.train == run.train and plan.known(found) is found
