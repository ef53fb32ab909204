"""The small programs beside real peers on loopback: watching a swarm, exporting its model, the whole quickstart."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from swarm.averaging.attestation import ranked
from swarm.host.home import Home
from swarm.network.records import Head, Status
from swarm.observer import Observer, Seen
from tests.swarm.support import peers_in_process, wait_until, write_run

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # as it is for a script that runs

import export
import monitor
import quickstart

ROOT = Path(__file__).parents[2]
NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
KEYS = ["run_id", "peers", "tokens", "tokens_per_s", "loss", "fragments", "peer_list"]


class Pair:
    """Two peers that have trained a little and stopped. They are still there, so their state holds still."""

    def __init__(self, peers, homes):
        self.peers, self.homes = peers, homes
        self.run_id = peers[0].participant.run.run_id
        self.maddrs = peers[0].maddrs

    def heads(self):
        return self.peers[0].heads()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    homes = [folder / "a", folder / "b"]
    run = write_run(folder, averaging={"tokens_per_round": 8_000})
    with peers_in_process() as make:
        first = make(homes[0], new_swarm=True, run=str(run), name="first\x1b[2J")
        first.participant.join()
        first.participant.start()
        second = make(homes[1], initial_peers=first.maddrs, name="second")
        second.participant.join()
        second.participant.start()
        wait_until(
            lambda: min(version for version, _ in first.heads()) >= 2 and second.participant.trainer.tokens > 0,
            timeout_s=60, what="two rounds of each fragment",
        )
        for peer in (first, second):
            peer.participant.trainer.stop()
        for peer in (first, second):  # each puts the rest of its work into a round, and waits for the other to have it
            peer.participant.leave()
        wait_until(lambda: first.heads() == second.heads(), timeout_s=30, what="equal heads")
        second.participant.write_checkpoint()
        yield Pair([first, second], homes)


def watch(capsys, *arguments):
    """(exit code, what --once --json printed, stderr)"""
    code = monitor.main([*arguments, "--once", "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def test_monitor_shows_both_peers_and_their_common_head(pair, capsys):
    code, view, _ = watch(capsys, "--initial-peers", *pair.maddrs, "--min-peers", "2")
    assert code == 0 and list(view) == KEYS
    assert view["run_id"] == pair.run_id and view["peers"] == 2
    assert view["tokens"] >= 16_000 and 0 < view["loss"] < 6
    assert [list(fragment) for fragment in view["fragments"]] == [["fragment", "holders", "version", "digest"]] * 2
    assert [(fragment["version"], fragment["digest"]) for fragment in view["fragments"]] == pair.heads()
    assert [fragment["holders"] for fragment in view["fragments"]] == [2, 2]
    assert {peer["name"] for peer in view["peer_list"]} == {"first\x1b[2J", "second"}
    assert len({tuple(peer["digests"]) for peer in view["peer_list"]}) == 1


def test_monitor_finds_all_through_any_peer_and_is_not_counted(pair, capsys):
    with Observer(pair.peers[1].maddrs) as other:
        other.ask_everybody(at_least=2)
        code, view, _ = watch(capsys, "--initial-peers", NOBODY, *pair.peers[1].maddrs, "--min-peers", "2")
        assert code == 0 and view["peers"] == 2
        assert {peer.peer_id for peer in other.seen()} == {peer.participant.network.peer_id for peer in pair.peers}
        directory = pair.peers[0].participant.network.directory
        assert set(directory.alive()) == {pair.peers[1].participant.network.peer_id}


def test_monitor_ends_with_1_where_there_are_too_few(pair, capsys, monkeypatch):
    monkeypatch.setattr(Observer.ask_everybody, "__kwdefaults__", {"at_least": 1, "wait_s": 1.5})
    code, view, err = watch(capsys, "--initial-peers", *pair.maddrs, "--min-peers", "3")
    assert code == 1 and view["peers"] == 2 and "2 peers, fewer than 3" in err


def test_monitor_refreshes_until_ctrl_c(pair, capsys, monkeypatch):
    looks = []

    def pause(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(monitor, "time", SimpleNamespace(sleep=pause))
    assert monitor.main(["--initial-peers", *pair.maddrs, "--interval", "7"]) == 0
    out = capsys.readouterr().out
    assert looks == [7.0, 7.0] and out.count(pair.run_id) == 2
    assert "first?[2J" in out and "\x1b" not in out  # a name must not be able to rewrite the screen


@pytest.mark.parametrize("arguments", [["--run-id", "other-0123456789ab"], []])
def test_monitor_says_what_is_wrong(pair, capsys, arguments):
    peers = pair.maddrs if arguments else [NOBODY]
    code = monitor.main(["--initial-peers", *peers, *arguments, "--once", "--join-timeout-s", "1.5"])
    out, err = capsys.readouterr()
    assert code == 1 and out == ""
    assert ("found no run other-0123456789ab" if arguments else "none of the 1 initial peers answered") in err
    assert "why:" in err and "do:" in err and "Traceback" not in err


def head(tokens, letter):
    return Head(version=tokens // 10, digest=letter * 64, tokens=tokens)


def seen(name="a", role="trainer", heads=(), alive=True, **more):
    status = Status(run_id="demo-0123456789ab", name=name, role=role, heads=list(heads), **more)
    return Seen(peer_id=f"id-{name}", status=status, heard_s_ago=0.5, alive=alive)


def test_the_head_with_most_tokens_is_shown_while_a_round_spreads():
    old, new, rival = head(10, "a"), head(20, "c"), head(20, "b")
    peers = [seen("a", heads=[old]), seen("b", heads=[new]), seen("c", heads=[rival]), seen("d", heads=[rival])]
    view = monitor.summary("demo-0123456789ab", peers, num_fragments=1)
    assert view["fragments"] == [{"fragment": 0, "holders": 4, "version": 2, "digest": "b" * 64}]
    assert monitor.table(view, peers)[-1].split() == ["0", "2", "4", "2", "b" * 16]
    assert ranked([old, new, rival, old]) == [rival, new, old]


def test_silent_peers_and_observers_are_not_counted_and_rendezvous_peers_are():
    peers = [
        seen("a", heads=[head(10, "a")], loss=2.0, tokens_per_s=5.0), seen("r", role="rendezvous"),
        seen("b", heads=[head(90, "b")], loss=4.0, tokens_per_s=5.0, alive=False),
    ]
    view = monitor.summary("demo-0123456789ab", peers, num_fragments=1)
    assert (view["peers"], view["tokens"], view["loss"], view["tokens_per_s"]) == (2, 10, 2.0, 5.0)
    assert "silent" in "\n".join(monitor.table(view, peers))


def test_a_fragment_counts_those_who_hold_it():
    peers = [
        seen("a", heads=[head(10, "a"), None, None]), seen("b", heads=[head(20, "b"), head(30, "c"), None]),
        seen("c", heads=[None, head(30, "c"), None]), seen("r", role="rendezvous"),
    ]
    view = monitor.summary("demo-0123456789ab", peers, num_fragments=3)
    assert [(f["holders"], f["version"]) for f in view["fragments"]] == [(2, 2), (2, 3), (0, None)]
    assert [peer["versions"] for peer in view["peer_list"]] == [[1, None, None], [2, 3, None], [None, 3, None], []]
    assert json.loads(json.dumps(view))["peer_list"][2]["digests"] == [None, "c" * 64, None]
    lines = monitor.table(view, peers)
    assert [line.split()[2] for line in lines[3:7]] == ["0", "0-1", "1", "-"]
    assert [line.split()[:4] for line in lines[-3:-1]] == [["0", "2", "2", "1"], ["1", "3", "2", "2"]]
    assert lines[-1].split() == ["2", "nobody", "holds", "it"]


@pytest.mark.parametrize(("held", "text"), [
    ([], "-"), ([0, 1, 2, 3], "all"), ([2], "2"), ([1, 2], "1-2"), ([0, 3], "2 of them"), ([7], "-"),
])
def test_a_stage_is_shown_as_its_first_and_last_fragment(held, text):
    assert monitor.span(held, 4) == text


def test_an_empty_swarm_is_shown_as_such():
    view = monitor.summary("demo-0123456789ab", [], num_fragments=2)
    assert view["peers"] == 0 and view["loss"] is None and view["fragments"][1]["digest"] is None
    assert "nobody has answered yet" in "\n".join(monitor.table(view, []))


def exported(capsys, *arguments):
    assert export.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_export_gives_the_same_weights_from_both_homes_and_from_the_live_swarm(pair, capsys, tmp_path):
    live = exported(capsys, tmp_path / "live", "--initial-peers", *pair.maddrs)
    homes = [exported(capsys, tmp_path / home.name, "--home", home) for home in pair.homes]
    for result in [live, *homes]:
        assert result["run_id"] == pair.run_id and result["tokens"] >= 16_000
        assert list(zip(result["versions"], result["digests"], strict=True)) == pair.heads()
    first = weights(tmp_path / "live")
    for folder in ("a", "b"):
        other = weights(tmp_path / folder)
        assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)


def test_export_evaluates_the_model_as_anybody_would_load_it(pair, capsys, tmp_path):
    assert export.main([str(tmp_path / "out"), "--home", str(pair.homes[0]), "--evaluate", "--prompt", "The dog"]) == 0
    out = capsys.readouterr().out
    assert f"{pair.run_id}: " in out and str(tmp_path / "out") in out and "  | The dog" in out
    assert 0 < float(out.split("held-out loss ")[1].split()[0]) < 5.4  # random weights: 5.6


PROBLEMS = {
    "no home": "there is no home folder", "empty home": "there is no run in", "no checkpoint": "no checkpoint of",
    "full folder": "not an earlier export", "no peer": "none of the 1 initial peers", "no such run": "cannot read",
}  # fmt: skip


@pytest.mark.parametrize("problem", sorted(PROBLEMS))
def test_export_says_what_is_wrong_and_writes_nothing(pair, capsys, tmp_path, problem):
    out, home = tmp_path / "out", tmp_path / "home"
    source = ["--home", home]
    if problem != "no home":
        home.mkdir()
    if problem == "no checkpoint":
        folder = home / "runs" / pair.run_id
        folder.mkdir(parents=True)
        (folder / "run.json").write_bytes((pair.homes[0] / "runs" / pair.run_id / "run.json").read_bytes())
        source += ["--run-id", pair.run_id]
    elif problem == "full folder":
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        source = ["--home", pair.homes[0]]
    elif problem == "no peer":
        source = ["--initial-peers", NOBODY, "--join-timeout-s", "1.5"]
    elif problem == "no such run":
        source = ["--home", pair.homes[0], "--run-id", "other-0123456789ab"]
    assert export.main([str(out), *map(str, source)]) == (2 if problem == "full folder" else 1)
    err = capsys.readouterr().err
    assert PROBLEMS[problem] in err and "do:" in err and "Traceback" not in err
    assert not out.exists() or [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_a_model_cannot_write_to_the_terminal_what_it_likes():
    assert export.quoted("def f():\n\tx\x1b[2J\r\n \n") == ["  | def f():", "  |         x?[2J"]


@pytest.mark.parametrize("name", ["monitor.py", "export.py", "quickstart.py"])
def test_help_does_not_wait_for_torch(name):
    result = subprocess.run(
        [sys.executable, "-X", "importtime", f"scripts/{name}", "--help"], cwd=ROOT, capture_output=True, text=True,
        timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0 and "usage:" in result.stdout and "entry" in result.stderr
    assert not [line for line in result.stderr.splitlines() if line.split("|")[-1].strip() in ("torch", "hivemind")]


def test_quickstart_trains_exports_and_says_how_a_friend_could_have_joined(capfd, tmp_path, monkeypatch):
    run = write_run(tmp_path, averaging={"tokens_per_round": 16_000})
    stale = tmp_path / "home" / "peer-0" / "stale"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier quickstart")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code = quickstart.main([
        "--home", str(tmp_path / "home"), "--run", str(run), "--peers", "2", "--max-seconds", "4", "--interval", "0.5",
    ])
    out, err = capfd.readouterr()
    assert code == 0, out + err
    assert not stale.exists()
    assert "2 peers" in out and "tok/s" in out and "4 s have passed" in out and "done: " in out
    before, after = (float(out.split(f"{word} training")[1].split()[0]) for word in ("before", "after"))
    assert before > 5 > after
    assert "python -m swarm.peer --initial-peers /ip4/" in out and "  | def " in out
    assert weights(tmp_path / "home" / "model")


@pytest.mark.parametrize(("end", "code", "text"), [
    (KeyboardInterrupt(), 130, "stopped before the end"),
    (SystemExit("peer 1 ended with an error"), 1, "peer 1 ended"),
])
def test_quickstart_ends_with_a_clear_word(capsys, tmp_path, monkeypatch, end, code, text):
    def train(*_):
        raise end

    monkeypatch.setattr(quickstart, "train", train)
    assert quickstart.main(["--home", str(tmp_path)]) == code
    out, err = capsys.readouterr()
    assert text in out + err and "Traceback" not in err


@pytest.mark.parametrize("busy", ["", "peer-0"])
def test_quickstart_never_deletes_what_somebody_uses(capsys, tmp_path, busy):
    with Home.open(tmp_path / busy) as home:
        home.key_bytes()
        assert quickstart.main(["--home", str(tmp_path)]) == 1
        assert "is in use" in capsys.readouterr().err
        assert (home.path / "identity.key").exists()


def test_quickstart_respects_swarm_home(monkeypatch, tmp_path):
    monkeypatch.setenv("SWARM_HOME", str(tmp_path))
    assert quickstart.make_parser().parse_args([]).home == tmp_path / "quickstart"
    monkeypatch.delenv("SWARM_HOME")
    assert quickstart.make_parser().parse_args([]).home == Path("~/.swarm/quickstart")
