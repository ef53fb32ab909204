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
    [published] = [line for line in text.splitlines() if "GPT-JT, as published" in line]
    assert published.split()[-5:] == ["12.7", "TB", "633", "TB", "50"] and "--line 20/100/30ms" in text
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


# ---- with lines ----


def small(folder: Path, **changes: Any) -> str:
    return run_file(folder, **{
        "model": {"config": SMALL}, "fragments": 4, "train": {"sequence_length": 64, "total_tokens": 1_000_000},
        "averaging": {"tokens_per_round": 100_000, "max_round_s": 3600.0}, **changes,
    })


def test_lines_bring_speed_rounds_days_and_money(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(
        "--run", small(tmp_path), "--memory", "2GB", "--line", "20/100/30ms", "--flops", "0.1T", "--watts", "50",
        "--price-kwh", "0.5", "--price-gpu-hour", "2", capsys=capsys,
    )
    outlook = found["machines"][0]["outlook"]
    assert found["replicas"] == outlook["machines"] == 4 and outlook["bound_by"] == "computing"
    assert outlook["tokens_per_s"] == pytest.approx(sum(chain["tokens_per_s"] for chain in outlook["chains"]))
    assert outlook["seconds"] == pytest.approx(1e6 / outlook["tokens_per_s"])
    assert outlook["kwh"] == pytest.approx(4 * 50 * outlook["seconds"] / 3.6e6)
    assert outlook["electricity"] == pytest.approx(0.5 * outlook["kwh"])
    assert outlook["rent"] == pytest.approx(4 * 2 * outlook["seconds"] / 3600)
    assert outlook["flop_per_s"] == 1e11 and outlook["line_tokens_per_s"] is None, "whole models need none to train"
    assert len(outlook["rounds"]) == 4 and outlook["num_rounds"] >= 10
    for one in outlook["rounds"]:
        assert one["seconds"] == pytest.approx(one["legs_s"] + one["sending_s"] + one["arithmetic_s"])
        assert one["legs_s"] == pytest.approx(4 * 0.015)


def test_a_topology_has_lines_too_and_as_many_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = small(tmp_path)
    home = planned("--run", file, "--memory", "2GB", "--topology", "home-asym", capsys=capsys)
    same = planned("--run", file, "--memory", "2GB", "--line", "20/100/80ms", capsys=capsys)
    assert home["replicas"] == 4 and home["lines"].endswith("80 ms there and back (home-asym)")
    one, other = (found["machines"][0]["outlook"] for found in (home, same))
    assert one["round_s"] == pytest.approx(other["round_s"]) and one["chains"] == other["chains"]
    assert one["seconds"] == pytest.approx(other["seconds"]) and one["sent_bytes"] == pytest.approx(other["sent_bytes"])
    two = planned(
        "--run", file, "--memory", "2GB", "--line", "20/100/80ms", "--line", "1/100/80ms", capsys=capsys
    )
    assert two["replicas"] == 2
    assert two["machines"][0]["outlook"]["sending_s"] > 2 * home["machines"][0]["outlook"]["sending_s"]
    mine = tmp_path / "mine.yaml"
    mine.write_text("hosts: {a: {up: 1mbit}, b: {}, c: {}}")
    assert planned("--run", file, "--memory", "2GB", "--topology", str(mine), capsys=capsys)["replicas"] == 3


def test_gpt_jt_beside_what_others_send(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned("--run", run_file(tmp_path), "--gpu", "rtx-3090", "h100", "--line", "1000/1000/80ms", capsys=capsys)
    published, rounds, thin, stages = found["comparison"]
    assert published["times_less"] == pytest.approx(50, abs=0.5)
    assert rounds["ddp_bytes"] == thin["ddp_bytes"] == found["ddp_bytes"]
    assert 180 < rounds["times_less"] < 200 and thin["times_less"] > 400 and "2 bits" in thin["what"]
    assert 50 < stages["times_less"] < rounds["times_less"] and "24 GB GPU" in stages["what"]
    large, larger = (machine["outlook"] for machine in found["machines"])
    assert larger["machines"] < large["machines"] == 16 and large["computer"] == "rtx-3090"
    assert larger["tokens_per_s"] > large["tokens_per_s"] and large["num_rounds"] >= 541


def test_with_lines_people_read_what_bounds_the_swarm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_file(tmp_path, averaging={"tokens_per_round": 6_553_600, "outer_momentum": 0.5, "max_round_s": 7200.0})
    arguments = ["--memory", "6GB+28GB", "24GB+56GB", "--line", "40/100/30ms"]
    assert plan.main(["--run", file, *arguments, "--price-gpu-hour", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "With 4 peers for each fragment, on lines of 40 up, 100 down Mbit/s, 30 ms there and back:" in text
    assert "6 GB GPU, 28 GB main: these machines alone cannot hold the model" in text
    assert "16 machines, rtx-3090 at 21.4 TFLOP/s" in text and "bound by memory for microbatches, 1 at once" in text
    assert "hidden behind training" in text and "opened by max_round_s" in text
    assert " days; a machine sends " in text and "at 0.3 a kWh" in text and "for rent at 0.5 a GPU-hour" in text
    assert "assumed, unless you say" in text and max(map(len, text.splitlines())) < 135
    assert plan.main(["--run", small(tmp_path), "--memory", "2GB", "--line", "0.01/0.01/1s"]) == 0
    assert "cannot keep up" in capsys.readouterr().out
    assert plan.main(["--run", small(tmp_path), "--memory", "2GB", "--line", "1/1/1s", "--replicas", "1"]) == 0
    assert "alone there is nothing to average" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "said"), [
    (["--line=-20/100/30ms"], "--line -20/100/30ms cannot be understood"),
    (["--line", "20/100"], "20/100/30ms"),
    (["--topology", "mars"], "home-100, home-asym"),
    (["--topology", "home-100", "--line", "1/1/1ms"], "say the same thing"),
    (["--topology", "home-100", "--replicas", "5"], "5 peers for each fragment need a line each"),
    (["--line", "1/1/1ms", "--line", "1/1/1ms", "--replicas", "3"], "there are 2"),
    (["--line", "1/1/1ms", "--gpu", "voodoo"], "there is no GPU called 'voodoo'"),
    (["--gpu", "rtx-3060", "h100", "--memory", "2GB"], "which GPU has which memory?"),
    (["--flops", "much"], "--flops much cannot be understood"),
    (["--flops=-1T"], "--flops must be over 0"),
    (["--utilisation", "2"], "--utilisation must be"),
    (["--watts=-5"], "--watts must not be negative"),
    (["--price-kwh=-1"], "--price-kwh must not be negative"),
    (["--price-gpu-hour", "nan"], "--price-gpu-hour must not be negative"),
    (["--cores", "0"], "--cores must be over 0"),
])
def test_nonsense_about_lines_and_machines_is_refused(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main(["--run", small(tmp_path), *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_sync_runs_have_no_rounds_to_hide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = small(tmp_path, averaging={"mode": "sync", "bits": 32, "tokens_per_round": 1024})
    assert plan.main(["--run", file, "--line", "20/100/30ms"]) == 2
    assert "a `sync` run waits for every round" in capsys.readouterr().err
    assert plan.main(["--run", file, "--memory", "2GB"]) == 0
    assert "with 2 bits" not in capsys.readouterr().out
