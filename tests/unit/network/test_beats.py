"""What two peers tell each other of themselves: all of it once, then differences, and all where one has forgotten."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.errors import BadMessage
from swarm.network import beats as beats_module
from swarm.network.beats import AGAIN_S, KEPT, Beat, Beats
from swarm.network.records import Contact, Head, Status, parse

RUN = "run-0123456789ab"
A, B, C = (letter * 40 for letter in "ABC")
THIRD = Contact(peer_id=C, maddrs=["/ip4/10.0.0.3/tcp/31337"])


def status(**more: Any) -> Status:
    heads = [Head(version=1, digest=str(index) * 64, tokens=10) for index in range(4)]
    return Status(**{
        "run_id": RUN, "name": "quick otter", "role": "trainer", "maddrs": ["/ip4/10.0.0.1/tcp/31337/p2p/" + A],
        "heads": heads, "pending": [1, 2, 3, 4], "tokens": 100, **more,
    })


class Pair:
    """Two peers. What travels is JSON, as on a link."""

    def __init__(self) -> None:
        self.now = 0.0
        self.of = {A: Beats(lambda: self.now), B: Beats(lambda: self.now)}
        self.bytes = 0

    def make(self, sender: str, said: Status, contacts: list[Contact] | None = None) -> str:
        text = json.dumps(self.of[sender].make(B if sender == A else A, said, contacts or []))
        self.bytes += len(text)
        return text

    def take(self, receiver: str, text: str) -> Status | None:
        return self.of[receiver].hear(B if receiver == A else A, parse(Beat, json.loads(text)))

    def tell(self, sender: str, said: Status) -> Status | None:
        return self.take(B if sender == A else A, self.make(sender, said))


def test_the_first_beats_are_whole_and_the_next_ones_are_differences() -> None:
    pair = Pair()
    assert pair.tell(A, status()) == status()
    assert pair.tell(B, status(name="slow owl")) == status(name="slow owl")
    whole, pair.bytes = pair.bytes / 2, 0
    later = status(tokens=200, pending=[5, 6, 7, 8], loss=2.5)
    assert pair.tell(A, later) == later
    assert pair.bytes < whole / 4
    again, pair.bytes = pair.bytes, 0
    assert pair.tell(A, later) == later
    assert pair.bytes <= again, "B has said nothing since, so it is the difference to the same one"


def test_what_is_as_it_was_costs_two_marks() -> None:
    pair = Pair()
    pair.tell(A, status())
    pair.tell(B, status())
    text = pair.make(A, status())
    assert set(json.loads(text)) == {"base", "have"} and pair.take(B, text) == status()


def test_what_has_its_default_again_is_told_as_gone() -> None:
    pair = Pair()
    pair.tell(A, status(leaving=True, loss=2.0))
    pair.tell(B, status())
    text = pair.make(A, status())
    assert sorted(json.loads(text)["gone"]) == ["leaving", "loss"]
    assert pair.take(B, text) == status()


def test_beats_that_cross_are_both_understood() -> None:
    pair = Pair()
    pair.tell(A, status())
    pair.tell(B, status())
    to_b, to_a = pair.make(A, status(tokens=1)), pair.make(B, status(tokens=2))
    assert pair.take(B, to_b) == status(tokens=1) and pair.take(A, to_a) == status(tokens=2)
    older, newer = pair.make(A, status(tokens=3)), pair.make(A, status(tokens=4))
    assert pair.take(B, newer) == status(tokens=4) and pair.take(B, older) == status(tokens=3)


@pytest.mark.parametrize("forgetful", [A, B])
def test_after_a_restart_on_either_side_it_begins_anew(forgetful: str) -> None:
    pair = Pair()
    for tokens in range(5):
        pair.tell(A, status(tokens=tokens))
        pair.tell(B, status(tokens=tokens))
    pair.of[forgetful] = Beats(lambda: pair.now)
    heard = [pair.tell(A, status(tokens=7)), pair.tell(B, status(tokens=8))]
    heard += [pair.tell(A, status(tokens=9)), pair.tell(B, status(tokens=9))]
    assert heard[-2:] == [status(tokens=9)] * 2
    assert heard[0] in (None, status(tokens=7)) and heard[1] in (None, status(tokens=8)), "never something else"


def test_a_difference_to_what_one_does_not_have_is_no_news_and_the_next_is_whole() -> None:
    pair = Pair()
    pair.tell(A, status())
    pair.tell(B, status())
    pair.of[B].keep_only([])
    assert pair.tell(A, status(tokens=5)) is None
    assert json.loads(pair.make(B, status())).get("have", "") == ""
    pair.tell(B, status())
    assert pair.tell(A, status(tokens=6)) == status(tokens=6)


def test_few_statuses_are_kept_of_each() -> None:
    pair = Pair()
    for tokens in range(20):
        pair.tell(A, status(tokens=tokens))
        pair.tell(B, status(tokens=tokens))
    for beats in pair.of.values():
        assert all(len(kept) <= KEPT for memory in (beats._told, beats._heard) for kept in memory.values())
        beats.keep_only([A, B])
        assert beats._told and beats._heard and beats._have and beats._passed_on
        beats.keep_only([C])
        assert not any((beats._told, beats._heard, beats._have, beats._passed_on))


def test_in_a_crowd_what_all_are_told_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    worked_out: list[Status] = []
    marked = beats_module._marked
    monkeypatch.setattr(beats_module, "_marked", lambda status: worked_out.append(status) or marked(status))
    sender, crowd = Beats(lambda: 0.0), {f"{number:040}": Beats(lambda: 0.0) for number in range(20)}
    heard: list[Status | None] = []
    for tokens in (1, 1, 2, 1):
        for name, peer in crowd.items():
            heard.append(peer.hear(A, parse(Beat, sender.make(name, status(tokens=tokens), []))))
            sender.hear(name, parse(Beat, peer.make(A, status(name=name), [])))
    assert heard == [status(tokens=tokens) for tokens in (1, 1, 2, 1) for _ in crowd]
    by_crowd = 4 * 20 - 20  # each hears the same once more in the second turn, and need not look at it
    own = 20  # what each of the crowd says of itself never changes
    at_sender = 3 + 20  # its three news in a row, and what it hears of each
    assert len(worked_out) == by_crowd + own + at_sender


@pytest.mark.parametrize("document", [
    {}, {"base": ""}, {"status": None}, {"base": "not a mark"}, {"base": "0" * 16, "more": 1},
    {"base": "0" * 16, "status": status().model_dump()}, {"base": "0" * 16, "gone": [1]},
    {"base": "0" * 16, "gone": ["name"] * 40}, {"base": "0" * 16, "contacts": [THIRD.model_dump()] * 9},
])
def test_nonsense_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(BadMessage, match="malformed Beat"):
        parse(Beat, document)


@pytest.mark.parametrize("change", [
    {"changed": {"tokens": -1}}, {"changed": {"tokens": "many"}}, {"changed": {"what": 1}}, {"gone": ["run_id"]},
    {"changed": {"heads": [{"version": 1}]}},
])
def test_a_difference_that_makes_no_status_is_refused_and_spoils_nothing(change: dict[str, Any]) -> None:
    pair = Pair()
    pair.tell(A, status())
    pair.tell(B, status())
    base = json.loads(pair.make(A, status()))["base"]
    with pytest.raises(BadMessage, match="malformed Status"):
        pair.take(B, json.dumps({"base": base, **change}))
    assert pair.take(B, json.dumps({"base": base, "changed": {"tokens": 3}})) == status(tokens=3)


def test_addresses_are_passed_on_again_after_a_while_or_when_they_are_others() -> None:
    pair = Pair()
    beats = pair.of[A]
    known = {C: THIRD.maddrs}
    assert beats.news(B, known) == [C]
    pair.make(A, status(), [THIRD])
    assert beats.news(B, known) == []
    assert beats.news(C, known) == [C] and beats.news(B, {A: THIRD.maddrs, C: THIRD.maddrs}) == [A]
    assert beats.news(B, {C: ["/ip4/10.0.0.4/tcp/1"]}) == [C]
    pair.now = AGAIN_S
    assert beats.news(B, known) == [C]
    pair.make(A, status())
    assert not beats._passed_on[B], "what is news again need not be kept"


changes = st.fixed_dictionaries({}, optional={
    "tokens": st.integers(0, 5), "leaving": st.booleans(), "loss": st.sampled_from([None, 0.1, 1 / 3, 2.0]),
    "pending": st.lists(st.integers(0, 3), max_size=4), "speed": st.floats(0, 1e12), "maddrs": st.just([]),
})


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(
    st.tuples(st.sampled_from([A, B]), changes, st.sampled_from(["in order", "lost", "late"])), max_size=25,
))
def test_whatever_is_lost_or_late_nothing_but_what_was_said_is_heard(story: list[tuple[str, Any, str]]) -> None:
    pair, late = Pair(), []
    said: dict[str, list[Status]] = {A: [], B: []}
    for sender, change, fate in story:
        said[sender].append(status(**change))
        text = pair.make(sender, said[sender][-1])
        if fate == "late":
            late.append((sender, text))
        elif fate == "in order":
            heard = pair.take(B if sender == A else A, text)
            assert heard in (None, said[sender][-1])
            for before, old in late:
                assert pair.take(B if before == A else A, old) in (None, *said[before])
            late = []
    for sender in (A, B, A, B):  # once nothing is lost any more, two exchanges are enough
        heard = pair.tell(sender, status(name="in the end"))
    assert heard == status(name="in the end")
    assert pair.tell(A, status(name="in the end")) == status(name="in the end")
