"""Real peers that hold different fragments: watched, exported, and back from their checkpoints. No peer holds all."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from swarm.train import run_source
from tests.swarm.support import InProcessPeer, peers_in_process, wait_until, write_run

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as it is for a script that runs

import export
import monitor

ROUND_S = 60.0


def averager(peer: InProcessPeer):  # type: ignore[no-untyped-def]
    assert peer.participant.averager is not None
    return peer.participant.averager


def let_go(peer: InProcessPeer, fragment: int) -> int:
    """As placement will do it; what is trained of it has ended before."""
    return peer.participant.network.run(averager(peer).remove(fragment, deadline_s=30.0))


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[InProcessPeer]]:
    """The first peer holds fragment 0, the second one fragment 1, after some rounds together."""
    folder = tmp_path_factory.mktemp("halves")
    with peers_in_process() as make:
        peers = [make(folder / "0", new_swarm=True, run=str(write_run(folder)))]
        peers[0].participant.join()
        peers[0].participant.start()
        peers.append(make(folder / "1", initial_peers=peers[0].maddrs))
        peers[1].participant.join()
        peers[1].participant.start()
        wait_until(
            lambda: all(
                {e.fragment for e in peer.events if e.kind == "round" and e.contributors == 2} == {0, 1}  # type: ignore[attr-defined]
                for peer in peers
            ), timeout_s=ROUND_S, what="rounds of both",
        )
        for peer in peers:
            assert peer.participant.trainer is not None
            peer.participant.trainer.stop()
        assert [let_go(peers[0], 1), let_go(peers[1], 0)] == [0, 0], "all that they had learnt of it is in rounds"
        yield peers


def test_each_fragment_is_exported_from_whoever_holds_it(
    halves: list[InProcessPeer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    states = [state for peer in halves for state in averager(peer).states()]
    assert [state.fragment for state in states] == [0, 1]
    out = tmp_path / "model"
    assert export.main([str(out), "--initial-peers", *halves[0].maddrs, "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["digests"] == [state.digest for state in states]
    assert result["versions"] == [state.version for state in states] and min(result["versions"]) > 0
    for fragment in (0, 1):
        assert f"fragment {fragment} is attested by one peer only: there is no other to ask" in printed.err
    model, _ = export.reload(out)
    held = run_source.hold(halves[0].participant.run)
    parameters = {name: values.detach() for name, values in model.named_parameters()}
    for state in states:
        for name, values in held.layouts[state.fragment].views(state.weights):
            assert torch.equal(parameters[name], values), name


def test_each_fragment_s_row_counts_its_holders(
    halves: list[InProcessPeer], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--initial-peers", *halves[1].maddrs, "--once", "--min-peers", "2"]
    assert monitor.main([*arguments, "--json"]) == 0
    view = json.loads(capsys.readouterr().out)
    assert [fragment["holders"] for fragment in view["fragments"]] == [1, 1]
    assert sorted([v is None for v in peer["versions"]] for peer in view["peer_list"]) == [[False, True], [True, False]]
    assert view["tokens"] == min(peer.participant.swarm_tokens() for peer in halves)
    assert monitor.main(arguments) == 0
    rows = capsys.readouterr().out.split("digest\n")[1].splitlines()
    assert [row.split()[:4:2] for row in rows if row] == [["0", "1"], ["1", "1"]]


def test_both_know_how_far_the_swarm_is(halves: list[InProcessPeer]) -> None:
    fewest = min(state.tokens for peer in halves for state in averager(peer).states())
    wait_until(
        lambda: [peer.participant.swarm_tokens() for peer in halves] == [fewest, fewest], timeout_s=10,
        what="each other's statuses",
    )
    assert fewest > 0


def test_a_checkpoint_holds_what_its_peer_holds_and_is_no_whole_model(
    halves: list[InProcessPeer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, peer in enumerate(halves):
        peer.participant.write_checkpoint()
        newest = max(peer.home.path.glob("runs/*/checkpoints/*/manifest.json"))
        document = json.loads(newest.read_text())
        assert [entry["fragment"] for entry in document["fragments"]] == [number] and document["num_fragments"] == 2
        assert document["fragments"][0]["digest"] == averager(peer).states()[0].digest
        assert export.main([str(tmp_path / "out"), "--home", str(peer.home.path)]) == 1
        err = capsys.readouterr().err
        assert "not the whole model" in err and "1 of its 2 fragments" in err and "--initial-peers" in err


def test_a_whole_newcomer_takes_each_fragment_from_its_holder(
    halves: list[InProcessPeer], tmp_path: Path
) -> None:
    with peers_in_process() as make:
        newcomer = make(tmp_path / "new", initial_peers=halves[0].maddrs)
        newcomer.participant.join()
        assert newcomer.heads() == [(s.version, s.digest) for peer in halves for s in averager(peer).states()]
        [state] = [e for e in newcomer.events if e.kind == "check" and e.name == "state"]  # type: ignore[attr-defined]
        assert "downloaded 2 fragments from others, on the word of the only one there" in state.text  # type: ignore[attr-defined]
