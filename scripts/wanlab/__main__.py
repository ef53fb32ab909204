"""The lab's command line.

    python scripts/wanlab up home-100           a ready-made topology, or a YAML file
    python scripts/wanlab exec a -- CMD ...     run CMD on host a (others have their names there)
    python scripts/wanlab cut a [b]             silence a host, or one pair of hosts; heal undoes it
    python scripts/wanlab kill a                power failure: silence, then SIGKILL of its processes
    python scripts/wanlab crash a               SIGKILL of its processes; peers see closed connections
    python scripts/wanlab set a up=50mbit       up, down, queue of its link, while it runs
    python scripts/wanlab path a b loss=0.1%    latency (one way), jitter, loss, while it runs
    python scripts/wanlab stats [--json]        bytes, drops, losses, and how late the forwarder is
    python scripts/wanlab down                  end and remove everything of it
    python scripts/wanlab list                  labs that are up, and the ready-made topologies

Several labs live side by side: --lab NAME or $WANLAB chooses one (default: lab).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from swarm.errors import ConfigError, SwarmError
from wanlab import machine
from wanlab.lab import Lab
from wanlab.topology import available, load, parse_loss, parse_rate, parse_time

LINK = {"up": ("up_bits_per_s", parse_rate), "down": ("down_bits_per_s", parse_rate), "queue": ("queue_s", parse_time)}
PATH = {"latency": ("latency_s", parse_time), "jitter": ("jitter_s", parse_time), "loss": ("loss", parse_loss)}


def main(argv: list[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    try:
        if options.verb == "list":
            show_list()
        elif options.verb == "up":
            lab = Lab(options.lab, load(options.topology))
            lab.up()
            show_hosts(lab)
        else:
            act(Lab.running(options.lab), options)
    except SwarmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wanlab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lab", default=os.environ.get("WANLAB", "lab"), help="name of the lab (default: $WANLAB)")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("up").add_argument("topology")
    for verb in ("exec", "cut", "heal", "kill", "crash", "set", "path"):
        verbs.add_parser(verb).add_argument("host")
    words = verbs.choices
    words["exec"].add_argument("command", nargs=argparse.REMAINDER)
    words["cut"].add_argument("peer", nargs="?")
    words["heal"].add_argument("peer", nargs="?")
    words["path"].add_argument("peer")
    words["set"].add_argument("changes", nargs="+", metavar="up=|down=|queue=")
    words["path"].add_argument("changes", nargs="+", metavar="latency=|jitter=|loss=")
    verbs.add_parser("stats").add_argument("--json", action="store_true")
    verbs.add_parser("down")
    verbs.add_parser("list")
    return parser


def act(lab: Lab, options: argparse.Namespace) -> None:
    if options.verb == "exec":
        execute(lab, options.host, options.command)
    elif options.verb == "cut":
        lab.cut(options.host, options.peer)
    elif options.verb == "heal":
        lab.heal(options.host, options.peer)
    elif options.verb == "kill":
        lab.kill(options.host)
    elif options.verb == "crash":
        lab.crash(options.host)
    elif options.verb == "set":
        lab.set_link(options.host, **read_changes(options.changes, LINK))
    elif options.verb == "path":
        lab.set_path(options.host, options.peer, **read_changes(options.changes, PATH))
    elif options.verb == "stats":
        show_stats(lab, as_json=options.json)
    elif options.verb == "down":
        lab.down()


def execute(lab: Lab, host: str, command: list[str]) -> None:
    """This process becomes the command."""
    command = command[1:] if command[:1] == ["--"] else command
    if not command:
        raise ConfigError("exec needs a command", do=f"python scripts/wanlab exec {host} -- ping b")
    words = lab.command(host, command)
    sys.stdout.flush()
    os.execvpe(words[0], words, {**os.environ, **lab.environment(host)})


def read_changes(words: list[str], known: dict[str, tuple[str, Any]]) -> dict[str, float]:
    """["up=50mbit"] -> {"up_bits_per_s": 5e7}"""
    changes = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in known or not equals:
            raise ConfigError(f"cannot read {word!r}", do=f"write {', '.join(f'{key}=...' for key in known)}")
        name, parser = known[key]
        changes[name] = parser(value)
    return changes


def show_hosts(lab: Lab) -> None:
    for host in lab.hosts:
        nat = lab.topology.host(host).nat
        print(f"{host:12} {lab.ip(host):16}" + (f" behind {lab.public_ip(host)} ({nat} NAT)" if nat else ""))


def show_stats(lab: Lab, *, as_json: bool) -> None:
    stats = lab.stats()
    if as_json:
        print(json.dumps(stats))
        return
    for name, counters in stats.items():
        print(f"{name:12}", *(f"{key}={value}" for key, value in counters.items()))


def show_list() -> None:
    for name in machine.labs():
        try:
            lab = Lab.running(name)
        except SwarmError as error:  # it is going down just now, or is another version's
            print(f"{name:12} {error.what}")
            continue
        state = "" if lab.is_running() else ", but its forwarder is gone: take it down"
        print(f"{name:12} up, {len(lab.hosts)} hosts{state}")
    print("ready-made: " + ", ".join(available()))


if __name__ == "__main__":
    sys.exit(main())
