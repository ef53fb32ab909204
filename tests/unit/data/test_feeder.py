"""A feeder has rows ready, goes on where it was told to, and keeps trying what fails."""

from __future__ import annotations

import threading

import pytest

from swarm.data.feeder import FIRST_PATIENCE_S, MAX_BACKOFF_S, PATIENCE_S, Feeder, Place, reason
from swarm.data.shelf import Mark
from swarm.errors import ConfigError, NetworkError
from tests.unit.data.made_up import ROWS, MadeUp, in_order


class One:
    """A feeder of one made-up source, with everything in the test's hands."""

    def __init__(self, source: MadeUp, place: Place = Place()) -> None:  # noqa: B008
        self.now, self.pauses, self.changed = 0.0, [], threading.Condition()
        self.retry = threading.Semaphore(0)
        self.feeder = Feeder(source, place, clock=lambda: self.now, changed=self.changed, pause=self._pause)
        self.feeder.start()

    def _pause(self, stop: threading.Event, seconds: float) -> None:
        self.pauses.append(seconds)
        while not self.retry.acquire(timeout=0.01) and not stop.is_set():
            pass

    def until(self, true) -> None:
        with self.changed:
            assert self.changed.wait_for(true, 60)

    def take(self, number: int) -> list[tuple[int, ...]]:
        found = []
        for _ in range(number):
            self.until(self.feeder.has_row)
            with self.changed:
                tokens = self.feeder.take().tokens.tolist()
            found.append((tokens[0], *tokens[2:5]))
        return found


@pytest.fixture
def one():
    made: list[One] = []

    def make(source: MadeUp, place: Place = Place()) -> One:  # noqa: B008
        made.append(One(source, place))
        return made[-1]

    yield make
    for each in made:
        each.feeder.stop()


def source(**options) -> MadeUp:
    return MadeUp(0, 0, "pile", **options)


def test_rows_come_in_order_over_blocks_and_passes(one):
    assert one(source()).take(50) == in_order(50)


@pytest.mark.parametrize("taken", [0, 1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS, 40])
def test_it_goes_on_at_its_place(one, taken):
    first = one(source())
    first.take(taken)
    other = one(source(), first.feeder.place)
    assert other.take(20) == in_order(taken + 20)[taken:]


def test_the_next_block_is_made_while_this_one_is_used(one):
    made = source()
    each = one(made)
    each.take(1)
    each.until(lambda: each.feeder._ready is not None)
    assert made.asked[:2] == [Mark(), Mark(0, 0, 1)] and len(made.asked) <= 3, "and no more than that is kept"


def test_a_failure_is_tried_again_after_longer_and_longer(one):
    made = source()
    made.error = NetworkError("no route", why="cable")
    each = one(made)
    for number in range(11):
        each.until(lambda: each.feeder.error is not None)
        assert each.feeder.is_stalled() and not each.feeder.has_row()
        if number < 10:
            each.retry.release()
            while len(each.pauses) < number + 2:
                each.changed.acquire()
                each.changed.wait(0.01)
                each.changed.release()
    assert each.pauses[:4] == [1.0, 2.0, 4.0, 8.0] and each.pauses[-1] == MAX_BACKOFF_S
    made.error = None
    each.retry.release()
    assert each.take(20) == in_order(20)
    assert each.feeder.error is None


def test_one_that_hangs_is_waited_for_for_a_while(one):
    made = source()
    made.gate.clear()
    each = one(made)
    assert not each.feeder.is_stalled()
    each.now = FIRST_PATIENCE_S - 1
    assert not each.feeder.is_stalled(), "finding and reading a source may take long"
    each.now = FIRST_PATIENCE_S + 1
    assert each.feeder.is_stalled()
    made.gate.set()
    each.take(1)
    each.until(lambda: each.feeder._ready is not None)
    made.gate.clear()
    each.take(ROWS)  # the block that was ready has begun: the next one is being waited for
    each.until(lambda: len(made.asked) >= 3)
    each.now += PATIENCE_S - 1
    each.take(ROWS - 1)


def test_time_runs_from_when_the_next_block_could_have_come(one):
    made = source()
    each = one(made)
    each.take(ROWS)
    made.gate.clear()
    each.until(lambda: each.feeder._ready is not None or len(made.asked) > 1)
    each.now = 1000.0
    while each.feeder.has_row():
        each.take(1)
        each.until(lambda: each.feeder.has_row() or len(made.asked) > 1)
    assert each.feeder.patience_s() <= PATIENCE_S


def test_blocks_without_a_row_are_passed_over_but_not_for_ever(one):
    class Sparse(MadeUp):
        def block(self, mark):
            rows, after = super().block(mark)
            return (rows if mark.row == 1 else []), after

    assert [row[2] for row in one(Sparse(0, 0, "pile")).take(3 * ROWS)] == [1] * 3 * ROWS
    empty = one(source(rows=0))
    empty.until(lambda: empty.feeder.error is not None)
    assert isinstance(empty.feeder.error, ConfigError) and "sources.pile" in empty.feeder.error.do


def test_a_library_s_own_errors_do_not_end_it(one):
    made = source()
    made.error = KeyError("surprise")
    each = one(made)
    each.until(lambda: each.feeder.error is not None)
    assert reason(each.feeder.error) == "KeyError: 'surprise'"
    made.error = None
    each.retry.release()
    assert each.take(2) == in_order(2)
    assert reason(NetworkError("no route", why="cable")) == "no route (cable)"


def test_it_ends_when_told_to(one):
    each = one(source())
    each.take(1)
    each.feeder.stop()
    each.feeder._thread.join(60)
    assert not each.feeder._thread.is_alive()
