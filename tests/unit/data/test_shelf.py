"""Blocks follow from their marks alone; a pass shows every sample once; other readers see other data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.data import shelf
from swarm.data.sample import Sample
from swarm.data.shards import Shard
from swarm.data.shelf import Kept, Layout, Mark, Shelf, Streamed, dice_of
from swarm.data.sources import is_held_out

LAYOUT = Layout(block_chars=200, room_chars=100, shots=2, held_out_percent=10.0)


def documents(number: int, name: str = "d") -> list[Sample]:
    return [Sample(f"{name}#{i}", f"text {i}".ljust(20)) for i in range(number)]


class Counted:
    """Shards of these sizes; counts how often each is opened, and how far it is read."""

    def __init__(self, *sizes: int) -> None:
        self.opened, self.read = [0] * len(sizes), [0] * len(sizes)
        self.shards = [Shard(f"s{n}", lambda n=n, size=size: self._samples(n, size)) for n, size in enumerate(sizes)]

    def _samples(self, number: int, size: int) -> Iterator[Sample]:
        self.opened[number] += 1
        for sample in documents(size, f"s{number}"):
            self.read[number] += 1
            yield sample


def blocks_of_pass(one: Shelf, number: int = 0) -> list[tuple[Mark, list[str]]]:
    mark, found = Mark(number), []
    while mark.number == number:
        packs, after = one.read(mark)
        found.append((mark, [sample.name for pack in packs for sample in pack.samples]))
        mark = after
    assert mark == Mark(number + 1)
    return found


def names(blocks: list[tuple[Mark, list[str]]]) -> list[str]:
    return [name for _, block in blocks for name in block]


def kept(number: int = 100, key: str = "0/anna/pile/0") -> Kept:
    return Kept(documents(number), key=key, layout=LAYOUT)


def test_a_pass_over_what_is_kept_shows_each_sample_once_in_an_order_of_its_own() -> None:
    one = kept()
    passes = [names(blocks_of_pass(one, number)) for number in range(3)]
    assert all(sorted(order) == sorted(passes[0]) and len(order) == 100 for order in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert all(len(block) == 10 for _, block in blocks_of_pass(one)), "blocks of 200 characters"


@pytest.mark.parametrize("make", [kept, lambda: Streamed(Counted(30, 7, 50).shards, key="k", layout=LAYOUT)])
def test_a_block_follows_from_its_mark_alone(make) -> None:
    blocks = blocks_of_pass(make()) + blocks_of_pass(make(), 1)
    other = make()
    for mark, block in reversed(blocks):
        assert [sample.name for pack in other.read(mark)[0] for sample in pack.samples] == block


def test_readers_sources_and_phases_have_orders_of_their_own() -> None:
    keys = ["0/anna/pile/0", "0/bert/pile/0", "0/anna/p3/0", "0/anna/pile/1", "1/anna/pile/0"]
    orders = [tuple(names(blocks_of_pass(kept(key=key)))) for key in keys]
    assert len(set(orders)) == 5
    same = sum(a == b for a, b in zip(orders[0], orders[1], strict=True))
    assert same < 10


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=9), number=st.integers(0, 3))
def test_a_pass_over_a_stream_shows_each_sample_once(sizes: list[int], number: int) -> None:
    counted = Counted(*sizes)
    found = names(blocks_of_pass(Streamed(counted.shards, key="k", layout=LAYOUT), number))
    everything = [sample.name for n, size in enumerate(sizes) for sample in documents(size, f"s{n}")]
    assert sorted(found) == sorted(name for name in everything if not is_held_out(name, held_out_percent=10.0))


def test_streams_begin_at_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "FIRST_ROWS", 400)
    firsts = set()
    for reader in range(12):
        packs, _ = Streamed(Counted(500).shards, key=f"0/{reader}/pile/0", layout=LAYOUT).read(Mark())
        firsts.add(min(int(sample.name.split("#")[1]) for pack in packs for sample in pack.samples))
    assert len(firsts) > 8


def test_a_stream_reads_no_more_than_the_block_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "FIRST_ROWS", 1)
    counted = Counted(1000, 1000, 1000, 1000, 1000, 1000)
    one = Streamed(counted.shards, key="k", layout=LAYOUT)
    mark = Mark()
    for _ in range(5):
        _, mark = one.read(mark)
    assert max(counted.opened) == 1 and counted.opened.count(0) == 2, "four at a time, each opened once"
    assert sum(counted.read) < 80


def test_of_many_tasks_a_pass_reads_a_window_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "FIRST_ROWS", 90)
    layout = dataclasses.replace(LAYOUT, open_shards=2, window_rows=30)
    one = Streamed(Counted(100, 20, 100, 100, 100).shards, key="k", layout=layout)
    found = [blocks_of_pass(one, number) for number in range(2)]
    for blocks in found:
        of_shards = [name.split("#")[0] for name in names(blocks)]
        assert {name: of_shards.count(name) > 15 for name in of_shards} == {f"s{n}": True for n in range(5)}
        assert max(map(of_shards.count, of_shards)) <= 30 and len(set(names(blocks))) == len(of_shards)
        assert {mark.shard for mark, _ in blocks} == {0, 2, 4}
    assert len(set(names(found[0])) & set(names(found[1]))) < 80, "another pass, another window"
    few = blocks_of_pass(Streamed(Counted(100, 100).shards, key="k", layout=layout))
    assert len(names(few)) > 160, "what is open at once is read whole"


def test_what_breaks_off_is_read_again_from_its_mark() -> None:
    fails = [False]

    def samples() -> Iterator[Sample]:
        for number, sample in enumerate(documents(100)):
            if fails[0] and number == 40:
                raise EOFError("gone")
            yield sample

    whole = blocks_of_pass(Streamed([Shard("s", samples)], key="k", layout=LAYOUT))
    one, found, mark = Streamed([Shard("s", samples)], key="k", layout=LAYOUT), [], Mark()
    while mark.number == 0:
        fails[0] = not fails[0]
        try:
            packs, after = one.read(mark)
        except EOFError:
            continue
        found.append((mark, [sample.name for pack in packs for sample in pack.samples]))
        mark = after
    assert found == whole


def test_what_is_held_out_is_never_in_a_stream() -> None:
    found = names(blocks_of_pass(Streamed(Counted(3000).shards, key="k", layout=LAYOUT)))
    assert 2600 < len(found) < 2800
    assert not [name for name in found if is_held_out(name, held_out_percent=10.0)]


def test_dice_never_change_between_versions() -> None:
    """Pinned: a checkpoint written before an upgrade must go on with the same rows after it."""
    assert dice_of("0/anna/pile/0", 0).randint(1000, size=3).tolist() == [291, 709, 240]
