"""Downloads of state: from several donors at once, from those that die or lie, and from none at all.

The donors are real; what carries their answers is a loop in this process, so that each can fail at a chosen chunk.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from swarm.averaging import download as module
from swarm.averaging import roll
from swarm.averaging.download import LEASE_S, MAX_LEASES, Donor, Wanted, download
from swarm.averaging.global_state import CHUNK_BYTES, GlobalState
from swarm.averaging.roll import Entry
from swarm.errors import BadMessage, NetworkError, PeerGone, PeerRefused, StateError
from swarm.network.keys import Keypair

NUMEL = 3 * CHUNK_BYTES // 4 + 100


def state_of(version: int = 7, seed: int = 0, numel: int = NUMEL) -> GlobalState:
    generator = torch.Generator().manual_seed(seed)
    weights, momentum = (torch.randn(numel, generator=generator) for _ in range(2))
    return GlobalState(1, version, version * 100, weights, (momentum,))


def wanted_of(state: GlobalState) -> Wanted:
    return Wanted(state.fragment, state.digest, state.weights.numel(), len(state.buffers))


Answer = tuple[dict[str, Any], bytes]
Fault = Callable[[str, dict[str, Any], Answer], Answer]


class Wire:
    """What `download` needs of an endpoint. `faults[peer]` may change an answer, or raise."""

    def __init__(self, donors: dict[str, Donor], faults: dict[str, Fault] | None = None) -> None:
        self.donors, self.faults = donors, faults or {}
        self.chunks: Counter[str] = Counter()
        self.in_flight: Counter[str] = Counter()
        self.most_in_flight = 0

    async def call(
        self, peer_id: str, method: str, header: dict[str, Any] | None = None, body: bytes = b"", *,
        deadline_s: float, max_answer: int = 0, maddrs: Iterable[str] = (),
    ) -> tuple[dict[str, Any], bytes]:
        assert header is not None and deadline_s > 0
        self.in_flight[peer_id] += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight[peer_id])
        try:
            await asyncio.sleep(0)  # others have their turn, as on a network
            if peer_id not in self.donors:
                raise PeerGone("cannot reach it")
            donor = self.donors[peer_id]
            if method == "state":
                answer = donor.manifest(header.get("digest"))
            else:
                answer = {}, donor.chunk(header["digest"], header["index"])
            if peer_id in self.faults:
                answer = self.faults[peer_id](method, header, answer)
            if len(answer[1]) > max_answer:
                raise BadMessage("an answer that is too long")
            if method == "chunk":
                self.chunks[peer_id] += 1
            return answer
        finally:
            self.in_flight[peer_id] -= 1


def fetch(wire: Wire, wanted: Wanted, donors: list[str], **more: Any) -> GlobalState:
    async def run() -> GlobalState:
        return await asyncio.wait_for(download(wire, wanted, donors, **more), 20)  # type: ignore[arg-type]

    return asyncio.run(run())


def donor_of(*states: GlobalState, clock: Callable[[], float] = lambda: 0.0) -> Donor:
    return Donor(lambda: states, clock)


def same_bits(one: GlobalState, other: GlobalState) -> bool:
    tensors = zip((one.weights, *one.buffers), (other.weights, *other.buffers), strict=True)
    return one.digest == other.digest and all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in tensors)


def dying_after(chunks: int) -> Fault:
    left = [chunks]

    def fault(method: str, header: dict[str, Any], answer: Answer) -> Answer:
        if method == "chunk":
            left[0] -= 1
            if left[0] < 0:
                raise PeerGone("the link ended")
        return answer

    return fault


def lying(method: str, header: dict[str, Any], answer: Answer) -> Answer:
    return (answer[0], bytes([answer[1][0] ^ 1]) + answer[1][1:]) if method == "chunk" else answer


@pytest.mark.parametrize("names", ["a", "ab", "abcde"])
def test_the_state_arrives_bit_for_bit(names: str) -> None:
    state, seen = state_of(), []
    wire = Wire({name: donor_of(state) for name in names})
    got = fetch(wire, wanted_of(state), list(names), on_progress=lambda done, total: seen.append((done, total)))
    assert same_bits(got, state) and (got.fragment, got.version, got.tokens) == (1, 7, 700)
    assert sorted(done for done, _ in seen) == list(range(1, state.num_chunks + 1))
    assert {total for _, total in seen} == {state.num_chunks}
    assert sum(wire.chunks.values()) == state.num_chunks, "no chunk is fetched twice"
    assert wire.most_in_flight <= module.CHUNKS_IN_FLIGHT


def test_several_donors_share_the_work() -> None:
    state = state_of(numel=20 * CHUNK_BYTES // 4)
    wire = Wire({name: donor_of(state) for name in "abc"})
    assert same_bits(fetch(wire, wanted_of(state), list("abc")), state)
    assert min(wire.chunks[name] for name in "abc") >= 5


@pytest.mark.parametrize("survives", [0, 1, 3])
def test_a_donor_that_dies_midway_is_made_good_by_another(survives: int) -> None:
    state = state_of()
    wire = Wire({"a": donor_of(state), "b": donor_of(state)}, {"a": dying_after(survives)})
    assert same_bits(fetch(wire, wanted_of(state), ["a", "b"]), state)
    assert wire.chunks["b"] == state.num_chunks - survives


def test_a_donor_that_lies_is_dropped() -> None:
    state = state_of()
    wire = Wire({"liar": donor_of(state), "b": donor_of(state)}, {"liar": lying})
    assert same_bits(fetch(wire, wanted_of(state), ["liar", "b"]), state)
    assert wire.chunks["liar"] <= module.CHUNKS_IN_FLIGHT, "it is asked for no more after the first lie"


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b""])
def test_chunks_of_a_wrong_length_are_lies(change: Callable[[bytes], bytes]) -> None:
    def fault(method: str, header: dict[str, Any], answer: Answer) -> Answer:
        return (answer[0], change(answer[1])) if method == "chunk" else answer

    state = state_of()
    wire = Wire({"a": donor_of(state), "b": donor_of(state)}, {"a": fault})
    assert same_bits(fetch(wire, wanted_of(state), ["a", "b"]), state)


def test_a_donor_without_that_version_is_passed_over() -> None:
    state = state_of()
    wire = Wire({"old": donor_of(state_of(6)), "gone": donor_of(state), "b": donor_of(state)})
    del wire.donors["gone"]
    assert same_bits(fetch(wire, wanted_of(state), ["old", "gone", "b"]), state)


def test_when_all_donors_die_it_says_how_much_is_missing() -> None:
    state = state_of()
    wire = Wire(
        {"a": donor_of(state), "b": donor_of(state)}, {"a": dying_after(1), "b": dying_after(2)}
    )
    with pytest.raises(StateError, match=f"{state.num_chunks - 3} of {state.num_chunks} chunks are missing"):
        fetch(wire, wanted_of(state), ["a", "b"])


@pytest.mark.parametrize("donors", [[], ["nobody"], ["other"]])
def test_when_nobody_has_it_there_is_an_error(donors: list[str]) -> None:
    state = state_of()
    with pytest.raises(StateError, match="nobody gave the manifest"):
        fetch(Wire({"other": donor_of(state_of(8))}), wanted_of(state), donors)


def manifest_fault(change: Callable[[dict[str, Any], bytes], Answer]) -> Fault:
    def fault(method: str, header: dict[str, Any], answer: Answer) -> Answer:
        return change(*answer) if method == "state" else answer

    return fault


@pytest.mark.parametrize("change", [
    lambda header, hashes: ({**header, "version": 8}, hashes),
    lambda header, hashes: ({**header, "tokens": 701}, hashes),
    lambda header, hashes: ({"version": 7}, hashes),
    lambda header, hashes: ({**header, "version": -7}, hashes),
    lambda header, hashes: ({**header, "version": "7"}, hashes),
    lambda header, hashes: ({**header, "version": 2**64}, hashes),
    lambda header, hashes: ({**header, "tokens": 10**400}, hashes),
    lambda header, hashes: (header, hashes[:-32]),
    lambda header, hashes: (header, hashes[:-1] + b"x"),
    lambda header, hashes: (header, hashes[32:64] + hashes[:32] + hashes[64:]),
    lambda header, hashes: (header, b""),
])
def test_a_manifest_that_does_not_match_the_digest_is_refused(change: Any) -> None:
    """Before any chunk is asked for; and the next donor's is taken."""
    state = state_of()
    wire = Wire({"a": donor_of(state)}, {"a": manifest_fault(change)})
    with pytest.raises(StateError, match="nobody gave the manifest"):
        fetch(wire, wanted_of(state), ["a"])
    assert not wire.chunks
    wire = Wire({"a": donor_of(state), "b": donor_of(state)}, {"a": manifest_fault(change)})
    assert same_bits(fetch(wire, wanted_of(state), ["a", "b"]), state)


@pytest.mark.parametrize(("version", "field"), [(1, "version"), (0, "version"), (0, "tokens")])
def test_true_is_no_version(version: int, field: str) -> None:
    """It equals 1 and hashes to the same digest, but nothing can be done with it afterwards."""
    state = dataclasses.replace(state_of(numel=256), version=version)
    fault = manifest_fault(lambda header, hashes: ({**header, field: bool(header[field])}, hashes))
    with pytest.raises(StateError, match="nobody gave the manifest"):
        fetch(Wire({"a": donor_of(state)}, {"a": fault}), wanted_of(state), ["a"])


def test_a_shape_other_than_the_run_configs_is_refused() -> None:
    state = state_of()
    same_chunks = dataclasses.replace(wanted_of(state), numel=CHUNK_BYTES)
    with pytest.raises(StateError, match="2 of 8 chunks are missing"):
        fetch(Wire({"a": donor_of(state)}), same_chunks, ["a"])
    with pytest.raises(StateError, match="nobody gave the manifest"):
        fetch(Wire({"a": donor_of(state)}), dataclasses.replace(wanted_of(state), numel=CHUNK_BYTES // 4), ["a"])


ROLL = tuple(
    Entry(peer_id, 7, 100 + number, 5_000)
    for number, peer_id in enumerate(sorted(Keypair(bytes([i]) * 32).peer_id for i in range(1, 65)))
)


def test_who_has_contributed_comes_along() -> None:
    """The newcomer's next outer step depends on it, as everybody's does."""
    state = dataclasses.replace(state_of(), roll=ROLL)
    wire = Wire({"a": donor_of(state), "b": donor_of(state)})
    assert fetch(wire, wanted_of(state), ["a", "b"]).roll == ROLL
    head = asyncio.run(module.newest_head(wire, 1, "a", numel=NUMEL, num_buffers=1))  # type: ignore[arg-type]
    assert head.digest == state.digest


@pytest.mark.parametrize("lie", [
    [], roll.to_json(ROLL[:-1]), [{**vars(ROLL[0]), "trained": 1}], roll.to_json(ROLL) * 3, "x", None, [[[]]],
])
def test_a_donor_that_lies_about_it_is_passed_over(lie: object) -> None:
    state = dataclasses.replace(state_of(), roll=ROLL)

    def liar(method: str, header: dict[str, Any], answer: Answer) -> Answer:
        return ({**answer[0], "roll": lie}, answer[1]) if method == "state" else answer

    wire = Wire({"a": donor_of(state), "b": donor_of(state)}, {"a": liar})
    assert fetch(wire, wanted_of(state), ["a", "b"]).roll == ROLL
    with pytest.raises(StateError, match="nobody gave the manifest"):
        fetch(Wire({"a": donor_of(state)}, {"a": liar}), wanted_of(state), ["a"])


def test_chunks_written_one_by_one_make_the_state() -> None:
    state = state_of()
    transfer = module._Transfer(
        wanted_of(state), 7, 700, state.chunk_hashes, [torch.full((NUMEL,), float("nan")) for _ in range(2)],
        list(range(state.num_chunks)),
    )
    for index in reversed(range(state.num_chunks)):
        module._store(transfer, index, bytes(state.chunk(index)))
    assert transfer.done == state.num_chunks
    assert torch.equal(transfer.tensors[0], state.weights) and torch.equal(transfer.tensors[1], state.buffers[0])
    with pytest.raises(BadMessage, match="chunk 0"):
        module._store(transfer, 0, bytes(state.chunk(1)))


def test_a_donor_keeps_an_old_version_while_somebody_downloads_it() -> None:
    now, states = [0.0], [state_of(7), state_of(6)]
    donor = Donor(lambda: states, lambda: now[0])
    old = states[0]
    donor.manifest(old.digest)
    states[:] = [state_of(9), state_of(8)]  # two rounds have passed
    for index in range(old.num_chunks):
        now[0] += LEASE_S * 0.9  # slow, but never silent for long
        data = donor.chunk(old.digest, index)
        assert hashlib.sha256(data).digest() == old.chunk_hashes[index * 32:index * 32 + 32]
    now[0] += LEASE_S * 1.1
    with pytest.raises(PeerRefused, match="does not have that version any more"):
        donor.chunk(old.digest, 0)


def test_leases_are_bounded() -> None:
    """Each keeps a whole fragment in memory; a stranger may ask for anything."""
    states = [state_of(version, seed=version, numel=256) for version in range(1, MAX_LEASES + 3)]
    shown = list(states)
    donor = Donor(lambda: shown, lambda: 0.0)
    for state in states:
        donor.manifest(state.digest)
    shown.clear()
    kept = 0
    for state in states:
        try:
            donor.find(state.digest)
            kept += 1
        except PeerRefused:
            continue
    assert kept == MAX_LEASES


def test_a_donor_without_room_for_old_versions_knows_when_the_newest_is_being_downloaded() -> None:
    now, states = [0.0], [state_of(7), state_of(6)]
    donor = Donor(lambda: states, lambda: now[0], max_leases=0)
    assert not donor.gives_what_it_cannot_keep()
    donor.manifest(states[1].digest)
    assert not donor.gives_what_it_cannot_keep(), "what is gone soon anyway"
    donor.manifest(states[0].digest)
    now[0] += LEASE_S * 0.9
    assert donor.gives_what_it_cannot_keep()
    donor.chunk(states[0].digest, 0)
    now[0] += LEASE_S * 0.9
    assert donor.gives_what_it_cannot_keep(), "as long as somebody asks for it"
    states[:] = [state_of(8), states[0]]
    assert not donor.gives_what_it_cannot_keep(), "the next one is nobody's yet"
    now[0] += LEASE_S
    states[:] = states[1:]
    assert not donor.gives_what_it_cannot_keep(), "who asked for it has gone"


def test_a_donor_with_room_keeps_what_is_asked_for_and_need_not_wait() -> None:
    donor = donor_of(state_of(7))
    donor.manifest(None)
    assert not donor.gives_what_it_cannot_keep()


def test_who_names_no_version_gets_the_newest_and_it_is_kept() -> None:
    state = state_of(numel=256)
    donor = donor_of(state)
    assert donor.manifest(None) == donor.manifest(state.digest)
    assert donor.find(state.digest) is state


@pytest.mark.parametrize("digest", [5, {}, [], "x", "0" * 64])
def test_a_donor_refuses_what_it_does_not_have(digest: object) -> None:
    with pytest.raises(NetworkError):
        donor_of(state_of(numel=256)).manifest(digest)


@pytest.mark.parametrize("index", [-1, 2, 10**9, None, "0", 0.0, [0]])
def test_a_donor_refuses_chunks_that_do_not_exist(index: object) -> None:
    state = state_of(numel=256)
    with pytest.raises(BadMessage, match="no such chunk"):
        donor_of(state).chunk(state.digest, index)
