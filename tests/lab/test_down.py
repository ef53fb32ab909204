"""A lab leaves nothing behind: after an ordinary `down`, one without a forwarder, one of half a lab; from any shell."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from swarm.errors import SwarmError
from tests.lab import lab_support as support
from tests.lab.lab_support import Lab, load, machine, namespaces, parse, pings, program, running

pytestmark = support.needs_a_lab
NAME = f"{support.NAME}d"
WANLAB = Path(__file__).parents[2] / "scripts" / "wanlab"
SMALL = {"defaults": {"latency": "1ms"}, "hosts": {"a": None, "b": {"nat": "cone"}}}
TOPOLOGY = parse(SMALL)


def wanlab(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(WANLAB), "--lab", NAME, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def left_behind() -> list[str]:
    """Whatever of this lab is still there."""
    folders = machine.RUN, namespaces.NETNS, namespaces.ETC
    return [str(path) for folder in folders for path in folder.glob(f"*{NAME}*")] + [str(pid) for pid in forwarders()]


def forwarders() -> list[int]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"{machine.RUN / NAME / 'control'}\0" in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
                found.append(int(pid))
    return found


@pytest.fixture(autouse=True)
def nothing_of_the_lab_is_left():
    assert not left_behind()
    yield
    if (machine.RUN / NAME).exists():
        Lab.running(NAME).down()
    assert not left_behind()


def test_all_of_it_goes_and_the_machine_is_as_before():
    """Also what all labs share, if no other lab is up beside this one."""
    alone = not machine.labs()
    found = machine.ALLOWED.read_text()
    if alone:  # as on a machine where cubic is not allowed
        machine.ALLOWED.write_text(" ".join(word for word in found.split() if word != "cubic"))
    before = machine.ALLOWED.read_text()
    try:
        with Lab(NAME, TOPOLOGY) as lab, running(program(lab, "a", support.SERVE, 5001)) as server:
            assert len(forwarders()) == 1
            assert pings(lab, "b", "a")
            assert "cubic" in machine.ALLOWED.read_text().split()
            assert {path.suffix for path in WANLAB.rglob("*.*")} <= {".c", ".md", ".py", ".pyc", ".yaml"}
            lab.down()
            assert server.wait(timeout=5) == -signal.SIGKILL
            assert not left_behind()
            assert machine.ALLOWED.read_text() == before
            lab.up()
        assert not alone or (not machine.RUN.exists() and not namespaces.ETC.exists())
        assert machine.ALLOWED.read_text() == before
    finally:
        if alone:
            machine.ALLOWED.write_text(found)


def test_down_without_a_forwarder_and_twice():
    lab = Lab(NAME, TOPOLOGY)
    lab.up()
    (pid,) = forwarders()
    os.kill(pid, signal.SIGKILL)
    while lab.is_running():
        time.sleep(0.02)
    for use in (lambda: lab.cut("a"), lab.stats, lambda: lab.set_link("a", up_bits_per_s=1e6)):
        with pytest.raises(SwarmError, match=r"the forwarder of lab .* is gone") as caught:
            use()
        assert "take the lab down" in caught.value.do
    lab.down()
    assert not left_behind()
    with pytest.raises(SwarmError, match=f"lab '{NAME}' is not up"):
        lab.down()


def test_up_that_fails_takes_back_what_it_did():
    with pytest.raises(SwarmError, match="no_such_thing"):
        Lab(NAME, parse({**SMALL, "sysctls": {"net.ipv4.no_such_thing": 1}})).up()
    assert not left_behind()
    with pytest.raises(SwarmError, match="no congestion control 'wishful'"):
        Lab(NAME, parse({**SMALL, "sysctls": {"net.ipv4.tcp_congestion_control": "wishful"}})).up()
    assert not left_behind()


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.4])
def test_up_that_was_killed_half_way_is_taken_down(after_s):
    up = subprocess.Popen([sys.executable, str(WANLAB), "--lab", NAME, "up", "nat"], stdout=subprocess.DEVNULL)
    while not (machine.RUN / NAME).exists():
        assert up.poll() is None
        time.sleep(0.002)
    time.sleep(after_s)
    up.kill()
    up.wait()
    time.sleep(0.3)  # the one program that it had just started ends by itself
    assert wanlab("down").returncode == 0
    assert not left_behind()


def test_what_another_version_made_is_left_to_it():
    folder = machine.RUN / NAME
    with machine.locked():
        folder.mkdir()
        (folder / "lab.json").write_text('{"hosts": {"a": {}}}')
    try:
        assert f"lab '{NAME}' was made by another version" in wanlab("down").stderr
        assert f"lab '{NAME}' was made by another version" in wanlab("list").stdout
        assert "is up already" in wanlab("up", "home-100").stderr
    finally:
        with machine.locked():
            shutil.rmtree(folder)


def test_somebody_elses_namespace_is_not_touched():
    namespaces.run("ip", "netns", "add", f"{NAME}.b")
    try:
        with pytest.raises(SwarmError, match="cannot be built") as caught:
            Lab(NAME, TOPOLOGY).up()
        assert f"{NAME}.b" in caught.value.why
        assert (namespaces.NETNS / f"{NAME}.b").exists() and not (machine.RUN / NAME).exists()
    finally:
        namespaces.run("ip", "netns", "del", f"{NAME}.b")


def test_from_several_shells():
    assert "is not up" in wanlab("exec", "a", "--", "true").stderr
    up = wanlab("up", "home-100")
    assert up.returncode == 0 and up.stdout.split()[:4] == ["a", "10.77.0.1", "b", "10.77.0.2"]
    again = wanlab("up", "home-100")
    assert again.returncode == 1 and "is up already" in again.stderr
    said = wanlab("exec", "b", "--", "sh", "-c", "echo $WANLAB $WANLAB_HOST $WANLAB_IP; ping -c 1 a")
    assert said.stdout.startswith(f"{NAME} b 10.77.0.2\n") and " 0% packet loss" in said.stdout
    assert wanlab("set", "a", "up=50mbit", "queue=1s").returncode == 0
    assert wanlab("path", "a", "b", "latency=75ms", "loss=0.1%").returncode == 0
    lab = Lab.running(NAME)
    assert lab.topology.up_bits_per_s("a") == 50e6 and lab.topology.down_bits_per_s("a") == 100e6
    assert lab.topology.latency_s("b", "a") == 0.075 and lab.topology.loss("a", "b") == pytest.approx(0.001)
    wrong = wanlab("set", "a", "up=fast")
    assert wrong.returncode == 2 and "cannot read 'fast'" in wrong.stderr
    assert "no host 'z'" in wanlab("cut", "z").stderr
    for words in (["cut", "a", "b"], ["heal", "a", "b"], ["cut", "c"], ["heal", "c"], ["crash", "d"], ["kill", "d"]):
        assert wanlab(*words).returncode == 0
    stats = json.loads(wanlab("stats", "--json").stdout)
    assert stats["b"]["up_bytes"] >= 84 and stats["d"]["cut"] == 1
    assert NAME in wanlab("list").stdout
    assert wanlab("down").returncode == 0
    second = wanlab("down")
    assert second.returncode == 1 and f"lab '{NAME}' is not up" in second.stderr


def test_sixty_four_hosts_fit():
    with Lab(NAME, parse({"hosts": {f"h{n}": None for n in range(64)}})) as lab:
        assert pings(lab, "h0", lab.ip("h63"))
        assert len(lab.stats()) == 65


def test_the_eight_countries_come_up():
    with Lab(NAME, load("gpt-jt")) as lab:
        assert pings(lab, "sydney", "frankfurt")[-1] == pytest.approx(0.265, rel=0.05)
