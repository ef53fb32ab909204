"""A swarm of which no peer holds all is evaluated and writes, and both are what its exported model does."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from swarm import chat, evaluate
from swarm.model.evaluate import sample_text
from swarm.pipeline import guest
from tests.swarm.support import GPTJ, InProcessPeer, peers_in_process, wait_until, write_run

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as it is for a script that runs

import export

PATIENCE_S = 200.0
"""longer than chain.FORGET_S: on a busy machine a peer may be given up and keep what it did for that long"""
PROMPT = "17. The quick"
STAGES = ["0:2", "1:3", "2:4"]


def stage_trainer(peer: InProcessPeer) -> Any:
    return peer.participant.trainer


def calm(peers: list[InProcessPeer]) -> None:
    """No more text is drawn; peers still serve, and all that they have learnt goes into rounds: from then on what they
    train with is what is exported."""
    for peer in peers:
        stage_trainer(peer)._leave.set()

    def settled() -> bool:
        return all(
            stage_trainer(peer)._serving.compute.in_flight == 0
            and peer.participant.averager is not None and not any(peer.participant.averager.pending())
            for peer in peers
        )

    wait_until(settled, timeout_s=PATIENCE_S, what="the last rounds")
    wait_until(
        lambda: len({(f, *head) for peer in peers for f, head in heads_of(peer).items()}) == 4,
        timeout_s=PATIENCE_S, what="equal versions",
    )


def heads_of(peer: InProcessPeer) -> dict[int, tuple[int, str]]:
    assert peer.participant.averager is not None
    return {state.fragment: (state.version, state.digest) for state in peer.participant.averager.states()}


def swarm(make: Any, folder: Path, stages: list[str], *, bits: int) -> list[InProcessPeer]:
    """After some training together."""
    run = write_run(
        folder, fragments=4, model={"config": {**GPTJ, "n_layer": 4}}, pipeline={"activation_bits": bits},
        averaging={"bits": 32, "tokens_per_round": 3_000, "max_round_s": 2.0},
    )
    peers: list[InProcessPeer] = []
    for number, stage in enumerate(stages):
        start: dict[str, object] = {"initial_peers": peers[0].maddrs} if peers else {"new_swarm": True, "run": str(run)}
        peers.append(make(folder / str(number), fragments=stage, **start))
        peers[-1].participant.join()
        peers[-1].participant.start()
    wait_until(
        lambda: peers[0].participant.swarm_tokens() > 9_000, timeout_s=PATIENCE_S, what="9,000 tokens in rounds",
    )
    return peers


def asked(capsys: pytest.CaptureFixture[str], script: Any, *arguments: str) -> dict[str, Any]:
    code = script.main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[InProcessPeer]]:
    with peers_in_process() as make:
        peers = swarm(make, tmp_path_factory.mktemp("exact"), STAGES, bits=32)
        calm(peers)
        yield peers


@pytest.fixture(scope="module")
def exported(exact: list[InProcessPeer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model"
    assert export.main([str(out), "--initial-peers", *exact[0].maddrs]) == 0
    return out


def test_the_loss_through_the_chain_is_that_of_the_exported_model(
    exact: list[InProcessPeer], exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = export.reload(exported)
    wanted = export.held_out_loss(exact[0].participant.run, model, tokenizer)
    assert wanted < 5.0, "it has learnt something"
    found = asked(capsys, evaluate, "--initial-peers", *exact[1].maddrs)
    assert found["nats_per_token"] == pytest.approx(wanted, abs=1e-4)
    assert found["nats_per_byte"] == found["nats_per_token"], "a token is a byte here"
    assert found["run_id"] == exact[0].participant.run.run_id and found["tokens"] == 31 * found["sequences"] > 3_000
    fewer = asked(capsys, evaluate, "--initial-peers", *exact[2].maddrs, "--sequences", "5")
    assert fewer["sequences"] == 5 and fewer["nats_per_token"] != found["nats_per_token"]


def test_it_writes_what_the_exported_model_writes(
    exact: list[InProcessPeer], exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = export.reload(exported)
    wanted = sample_text(model, tokenizer, PROMPT, max_new_tokens=16, temperature=0.0)
    peers = ["--initial-peers", *exact[2].maddrs]
    found = asked(capsys, chat, "--prompt", PROMPT, *peers, "--temperature", "0", "--max-tokens", "16")
    assert (found["text"], found["tokens"]) == (wanted, 16) and len(wanted) > 4
    drawn = [
        asked(capsys, chat, "--prompt", PROMPT, *peers, "--max-tokens", "12", "--top-k", "20", "--seed", seed)["text"]
        for seed in ("1", "1", "2")
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_it_goes_on_beyond_the_length_that_it_was_trained_with(
    exact: list[InProcessPeer], capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--initial-peers", *exact[0].maddrs, "--temperature", "0", "--max-tokens", "40"]
    code = chat.main(["--prompt", "", *how])
    out, err = capsys.readouterr()
    assert code == 0 and "40 tokens in" in err, "a training sequence has 32, and an empty prompt is a beginning, too"
    assert len(out) > 20 and all(c.isprintable() or c == "\n" for c in out)


def test_nothing_of_the_questions_stays(exact: list[InProcessPeer]) -> None:
    for peer in exact:
        serving = stage_trainer(peer)._serving
        wait_until(lambda serving=serving: not serving.chain._entries, timeout_s=10, what="answers")  # type: ignore[misc]
        assert serving.compute.in_flight == 0
        assert peer.participant.averager is not None and not any(peer.participant.averager.pending())


def test_where_a_fragment_has_no_holder_both_say_so(
    exact: list[InProcessPeer], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test of this swarm: its end is gone."""
    monkeypatch.setattr(guest, "GAP_S", 2.0)
    exact[2].close()
    for script, more in ((evaluate, []), (chat, ["--prompt", PROMPT])):
        code = script.main([*more, "--initial-peers", *exact[0].maddrs])
        out, err = capsys.readouterr()
        assert code == 1 and "nobody here holds fragment 3" in err and "why:" in err and "do:" in err
        assert out == "" and "Traceback" not in err


def test_with_8_bits_and_while_it_trains_it_is_close(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with peers_in_process() as make:
        peers = swarm(make, tmp_path, ["0:2", "2:4"], bits=8)
        busy = asked(capsys, evaluate, "--initial-peers", *peers[0].maddrs, "--sequences", "64")
        tokens = peers[0].participant.swarm_tokens()
        wait_until(lambda: peers[0].participant.swarm_tokens() > tokens, timeout_s=PATIENCE_S, what="training goes on")
        calm(peers)
        out = tmp_path / "model"
        assert export.main([str(out), "--initial-peers", *peers[0].maddrs]) == 0
        capsys.readouterr()
        found = asked(capsys, evaluate, "--initial-peers", *peers[0].maddrs)
        model, tokenizer = export.reload(out)
        wanted = export.held_out_loss(peers[0].participant.run, model, tokenizer)
        assert found["nats_per_token"] == pytest.approx(wanted, rel=0.005)
        assert wanted - 0.1 < busy["nats_per_token"] < 5.5, "it was asked before the end"


@pytest.mark.parametrize("arguments", [["--sequences", "0"], ["--sequences", "x"]])
def test_nonsense_is_refused_by_the_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for script, more in [(evaluate, arguments), (chat, ["--top-k", "0"]), (chat, ["--temperature", "-1"])]:
        with pytest.raises(SystemExit) as caught:
            script.main([*more, "--initial-peers", "/ip4/127.0.0.1/tcp/1"])
        assert caught.value.code == 2 and "usage:" in capsys.readouterr().err
