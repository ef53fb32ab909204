"""What follows from what others say they see of this peer."""

import itertools

import pytest

from swarm.network.reachability import OUTBOUND, PUBLIC, PUNCHED, UNKNOWN, Sighting, can_meet, judge

PORT = 31337


def seen(port, *, reached=False, host="203.0.113.7"):
    return Sighting(reached, host, port)


@pytest.mark.parametrize(("sightings", "reach"), [
    ([], UNKNOWN),
    ([seen(5, reached=True)], PUBLIC),
    ([seen(PORT), seen(5, reached=True), seen(9)], PUBLIC),  # one that gets in is proof; that others do not is none
    ([seen(PORT)], PUNCHED),
    ([seen(PORT), seen(PORT)], PUNCHED),
    ([seen(40_000), seen(40_000)], PUNCHED),  # another port than ours, but the same one for everybody
    ([seen(40_000)], OUTBOUND),  # one witness cannot tell whether it is the same one for everybody
    ([seen(PORT), seen(40_000)], OUTBOUND),
    ([seen(40_001), seen(40_002)], OUTBOUND),
    ([seen(0), seen(0)], OUTBOUND),  # who does not say is no witness
])
def test_a_situation_follows_from_the_sightings(sightings, reach):
    assert judge(sightings, port=PORT).reach == reach
    for order in itertools.permutations(sightings):
        assert judge(order, port=PORT).reach == reach


def test_who_listens_nowhere_only_dials():
    assert judge([seen(PORT, reached=True)], port=None).reach == OUTBOUND


@pytest.mark.parametrize("sightings", [[seen(PORT)], [seen(1), seen(2)], [seen(5, reached=True)]])
def test_the_text_says_where_and_what_it_means(sightings):
    text = judge(sightings, port=PORT).text
    assert "203.0.113.7" in text and len(text) > 30


def test_who_can_dial_whom():
    places = (PUBLIC, PUNCHED, OUTBOUND, UNKNOWN)
    cannot = {(mine, theirs) for mine in places for theirs in places if not can_meet(mine, theirs)}
    assert cannot == {(mine, OUTBOUND) for mine in places} | {(OUTBOUND, PUNCHED)}
