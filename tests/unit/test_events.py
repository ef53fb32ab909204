"""The JSON names of the events are a contract with users' scripts: fields may be added, none renamed or removed."""

import dataclasses
import json
import threading

import pytest

from swarm import events
from swarm.events import Bus, Check, Contributors, Event, Left, Progress, Ready, Round, Warning

CONTRACT = {
    "ready": {"run_id", "peer_id", "maddrs", "join"},
    "progress": {"tokens", "swarm_tokens", "loss", "tokens_per_s", "peers"},
    "round": {
        "fragment", "version", "digest", "contributors", "tokens", "bytes_sent", "bytes_received", "seconds",
    },
    "warning": {"text"},
    "left": {"reason"},
}  # fmt: skip
ONE_OF_EACH = [
    Check(name="device", text="CPU", seconds=0.1),
    Ready(run_id="demo-0123456789ab", peer_id="12D3", maddrs=["/ip4/127.0.0.1/tcp/1"], join="python -m swarm.peer"),
    Progress(tokens=1, swarm_tokens=2, loss=3.0, tokens_per_s=4.0, peers=5),
    Round(
        fragment=0, version=1, digest="ab", contributors=2, tokens=3, bytes_sent=4, bytes_received=5, seconds=6.0
    ),
    Warning(text="w"),
    Contributors(names=["Ada"]),
    Left(reason="finished"),
]  # fmt: skip


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda event: event.kind)
def test_the_contract_s_names_are_there(event):
    written = json.loads(json.dumps(event.as_json()))
    assert written.pop("event") == event.kind
    assert written.keys() >= CONTRACT.get(event.kind, set())
    assert written == dataclasses.asdict(event)


def test_every_kind_of_event_has_a_name_of_its_own_and_is_covered_here():
    kinds = [cls for cls in vars(events).values() if isinstance(cls, type) and issubclass(cls, Event)]
    assert len({cls.kind for cls in kinds}) == len(kinds)
    assert {type(event) for event in ONE_OF_EACH} == {*kinds} - {Event}
    assert CONTRACT.keys() <= {cls.kind for cls in kinds}


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda event: event.kind)
def test_events_cannot_be_changed(event):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, dataclasses.fields(event)[0].name, "other")


def test_the_bus_gives_every_listener_every_event_in_order():
    bus, first, second = Bus(), [], []
    bus.emit(ONE_OF_EACH[0])  # nobody listens: lost, and no error
    bus.listen(first.append)
    bus.emit(ONE_OF_EACH[1])
    bus.listen(second.append)
    bus.emit(ONE_OF_EACH[2])
    assert first == ONE_OF_EACH[1:3]
    assert second == ONE_OF_EACH[2:3]


def test_a_listener_may_emit():
    bus, seen = Bus(), []
    bus.listen(lambda event: bus.emit(Warning(text="again")) if event.kind == "left" else None)
    bus.listen(seen.append)
    bus.emit(Left(reason="finished"))
    assert [event.kind for event in seen] == ["warning", "left"]


def test_events_of_many_threads_reach_all_listeners_in_one_order():
    bus, first, second = Bus(), [], []
    bus.listen(first.append)
    bus.listen(second.append)

    def emit(thread):
        for n in range(100):
            bus.emit(Warning(text=f"{thread} {n}"))

    threads = [threading.Thread(target=emit, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first == second
    assert len(first) == 400
