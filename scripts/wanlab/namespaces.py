"""A host as the kernel sees it: a network namespace, and a second one for its router when it is behind NAT."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path

from swarm.errors import SwarmError
from wanlab import machine, processes
from wanlab.topology import Host

NETNS = Path("/run/netns")
ETC = Path("/etc/netns")
MTU = 1500
MASQUERADE = {
    "cone": [],  # ports are kept where they are free, so all the world sees one mapping
    "symmetric": ["--random-fully"],  # another port for every destination
}
SET_SYSCTLS = 'while [ $# -gt 0 ]; do echo "$2" > "/proc/sys/$1" || exit 1; shift 2; done'


def run(*command: object) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True)
    if result.returncode:
        raise SwarmError(f"this failed: {' '.join(words)}", why=result.stderr.strip() or f"code {result.returncode}")
    return result.stdout


def exists(namespace: str) -> bool:
    return (NETNS / namespace).exists() or (ETC / namespace).exists()


def add(namespace: str) -> None:
    run("ip", "netns", "add", namespace)
    run("ip", "-n", namespace, "link", "set", "lo", "up")


def remove(namespace: str) -> None:
    """With all that runs in it. Nothing is wrong if it is not there."""
    processes.end_in_namespace(NETNS / namespace)
    if (NETNS / namespace).exists():
        run("ip", "netns", "del", namespace)
    for file in ("hosts", "resolv.conf"):
        (ETC / namespace / file).unlink(missing_ok=True)
    for folder in (ETC / namespace, ETC):
        with contextlib.suppress(OSError):  # not there, or in use by others
            folder.rmdir()


def write_names(namespace: str, addresses: dict[str, str]) -> None:
    """What `ip netns exec` shows as /etc/hosts; and there is no name server in this world."""
    folder = ETC / namespace
    folder.mkdir(parents=True)
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    (folder / "resolv.conf").write_text("")


def set_sysctls(namespace: str, sysctls: dict[str, str]) -> None:
    words = [word for key, value in sysctls.items() for word in (key.replace(".", "/"), value)]
    run("ip", "netns", "exec", namespace, "sh", "-c", SET_SYSCTLS, "sh", *words)


def set_up_wan(namespace: str, host: Host, address: str, prefix_length: int) -> None:
    options = ["mtu", MTU, "txqueuelen", 2000, "gso_max_size", _gso_bytes(host)]
    run("ip", "-n", namespace, "link", "set", "wan0", *options, "up")
    run("ip", "-n", namespace, "addr", "add", f"{address}/{prefix_length}", "dev", "wan0")


def set_up_home(namespace: str, router: str, host: Host, address: str) -> None:
    """The network behind NAT: host eth0 -- lan0 router wan0."""
    gateway = address.rsplit(".", 1)[0] + ".1"
    run("ip", "-n", namespace, "link", "add", "eth0", "type", "veth", "peer", "name", "lan0", "netns", router)
    run("ip", "-n", namespace, "link", "set", "eth0", "gso_max_size", _gso_bytes(host), "up")
    run("ip", "-n", router, "link", "set", "lan0", "up")
    run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
    run("ip", "-n", router, "addr", "add", f"{gateway}/24", "dev", "lan0")
    run("ip", "-n", namespace, "route", "add", "default", "via", gateway)
    _set_up_nat(router, host, address)


def wan_counters(namespace: str) -> dict[str, int]:
    """The kernel's own counters of wan0. `overrun`: packets that the forwarder was too slow to take; must be 0."""
    try:
        link = json.loads(run("ip", "-n", namespace, "-s", "-j", "link", "show", "wan0"))[0]["stats64"]
    except SwarmError as error:
        raise SwarmError(f"{namespace} has no wan0", why="the forwarder is gone", do="take the lab down") from error
    sent, received = link["tx"], link["rx"]
    overrun = sent["dropped"] + received["dropped"]
    return {"if_tx_bytes": sent["bytes"], "if_rx_bytes": received["bytes"], "overrun": overrun}


def _gso_bytes(host: Host) -> int:
    """A sender's large packets hold about 0.5 ms of its uplink, so that they do not distort slow links."""
    if not host.up_bits_per_s:
        return 65536
    return min(65536, max(2 * (MTU + 14), int(host.up_bits_per_s / 8 * 0.0005)))


def _set_up_nat(router: str, host: Host, address: str) -> None:
    run("ip", "netns", "exec", router, "sh", "-c", SET_SYSCTLS, "sh", "net/ipv4/ip_forward", 1)
    tables = _iptables(router)
    masquerade = ["-o", "wan0", "-j", "MASQUERADE", *MASQUERADE[host.nat]]
    run(*tables, "-t", "nat", "-A", "POSTROUTING", *masquerade)
    for port in host.forward:
        for protocol in ("tcp", "udp"):
            incoming = ["-i", "wan0", "-p", protocol, "--dport", port]
            run(*tables, "-t", "nat", "-A", "PREROUTING", *incoming, "-j", "DNAT", "--to-destination", address)
            run(*tables, "-A", "FORWARD", *incoming, "-j", "ACCEPT")
    for chain in ("INPUT", "FORWARD"):  # as home routers do: what nobody asked for is dropped in silence
        incoming = ["-A", chain, "-i", "wan0"]
        run(*tables, *incoming, "-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT")
        run(*tables, *incoming, "-p", "icmp", "--icmp-type", "echo-request", "-j", "ACCEPT")
        run(*tables, *incoming, "-j", "DROP")


def _iptables(router: str) -> list[str]:
    """Debian has two of them, and a kernel need not have what both want. Their lock file would stay in /run."""
    why, lock = "", f"XTABLES_LOCKFILE={machine.RUN / '.xtables.lock'}"
    for program in ("iptables-legacy", "iptables"):
        tables = ["ip", "netns", "exec", router, "env", lock, program, "--wait"]
        try:
            run(*tables, "-t", "nat", "-S")
        except SwarmError as error:
            why = error.why
        else:
            return tables
    raise SwarmError("no iptables works here, so there is no NAT", why=why, do="use a topology without nat")
