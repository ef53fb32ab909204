#!/usr/bin/env python3
"""Watch a swarm: who is in it, what each fragment's newest version is, how fast it trains, and its loss.

Joins as an observer, which peers do not count and which serves nothing. Ends with Ctrl+C; for cron and scripts there
are --once, --json and --min-peers (exit code 1 where fewer peers answer).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from entry import guarded, start

if TYPE_CHECKING:
    from swarm.observer import Observer, Seen

COLUMNS = "{:<16} {:<11} {:>7} {:>8} {:>9} {:>7} {:>8}  {}"


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    return guarded(lambda: watch(options))


def watch(options: argparse.Namespace) -> int:
    from swarm.observer import Observer  # imports torch: --help must not wait for it

    with Observer(options.initial_peers, run_id=options.run_id, join_timeout_s=options.join_timeout_s) as observer:
        observer.ask_everybody(at_least=max(1, options.min_peers))
        try:
            while True:
                view = show(observer, options)
                if view["peers"] < options.min_peers:
                    print(f"{view['peers']} peers, fewer than {options.min_peers}", file=sys.stderr)
                    return 1
                if options.once:
                    return 0
                time.sleep(options.interval)
                observer.ask_again()
        except KeyboardInterrupt:
            return 0  # the ordinary end of watching


def show(observer: Observer, options: argparse.Namespace) -> dict[str, Any]:
    seen = observer.seen()
    view = summary(observer.run.run_id, seen, num_fragments=observer.run.fragments)
    if options.json:
        print(json.dumps(view), flush=True)
    else:
        clear = "\x1b[H\x1b[J" if sys.stdout.isatty() and not options.once else ""
        print(clear + "\n".join(table(view, seen)) + ("" if options.once else "\n"), flush=True)
    return view


def summary(run_id: str, seen: Sequence[Seen], *, num_fragments: int) -> dict[str, Any]:
    """What --json prints. Its keys are a contract; `tokens` are those in committed rounds. A peer's `versions` and
    `digests` have an entry for each fragment, null for those that it does not hold."""
    from swarm.averaging.attestation import ranked

    alive = [peer for peer in seen if peer.alive]
    fragments, tokens = [], []
    for index in range(num_fragments):
        heads = [head for peer in alive if (head := peer.status.head(index)) is not None]
        newest = ranked(heads)[0] if heads else None
        tokens.append(newest.tokens if newest else 0)
        fragments.append({
            "fragment": index, "holders": len(heads), "version": newest.version if newest else None,
            "digest": newest.digest if newest else None,
        })
    losses = [peer.status.loss for peer in alive if peer.status.loss is not None]
    return {
        "run_id": run_id,
        "peers": len(alive),
        "tokens": min(tokens, default=0),
        "tokens_per_s": round(sum(peer.status.tokens_per_s for peer in alive), 1),
        "loss": round(sum(losses) / len(losses), 4) if losses else None,
        "fragments": fragments,
        "peer_list": [
            {
                "peer_id": peer.peer_id, "name": peer.status.name, "role": peer.status.role,
                "tokens": peer.status.tokens, "tokens_per_s": round(peer.status.tokens_per_s, 1),
                "loss": peer.status.loss, "heard_s_ago": round(peer.heard_s_ago, 1), "leaving": peer.status.leaving,
                "versions": [head.version if head else None for head in peer.status.heads],
                "digests": [head.digest if head else None for head in peer.status.heads],
            }
            for peer in alive
        ],
    }


def table(view: dict[str, Any], seen: Sequence[Seen]) -> list[str]:
    """The same for people. Names are chosen by strangers, so they are made harmless."""
    from swarm.units import format_count, printable

    loss = "?" if view["loss"] is None else f"{view['loss']:.3f}"
    lines = [
        f"run {view['run_id']}  peers {view['peers']}  tokens {format_count(view['tokens'])}"
        f"  {format_count(view['tokens_per_s'])} tok/s  loss {loss}",
        "",
        COLUMNS.format("peer", "role", "holds", "tokens", "tok/s", "loss", "heard", "peer id"),
    ]
    for peer in seen:
        status = peer.status
        role = status.role if peer.alive and not status.leaving else "leaving" if peer.alive else "silent"
        lines.append(COLUMNS.format(
            printable(status.name, max_chars=16), role, span(status.held(), len(view["fragments"])),
            format_count(status.tokens), format_count(status.tokens_per_s),
            "-" if status.loss is None else f"{status.loss:.3f}", f"{peer.heard_s_ago:.0f} s", peer.peer_id,
        ))
    if not seen:
        lines.append("nobody has answered yet")
    lines += ["", "fragment  version  holders  at this version  digest"]
    for fragment in view["fragments"]:
        index, digest = fragment["fragment"], fragment["digest"]
        if digest is None:
            lines.append(f"{index:>8}  nobody holds it")
            continue
        current = sum(digest in peer["digests"][index:index + 1] for peer in view["peer_list"])
        lines.append(f"{index:>8}  {fragment['version']:>7}  {fragment['holders']:>7}  {current:>15}  {digest[:16]}")
    return lines


def span(held: Iterable[int], num_fragments: int) -> str:
    """Fragments that a peer holds: "all", "1-2", "3", "-" for none."""
    known = sorted(index for index in held if index < num_fragments)
    if not known:
        return "-"
    if len(known) == num_fragments:
        return "all"
    first, last = known[0], known[-1]
    if last - first + 1 > len(known):  # no peer of ours does so; strangers may say anything
        return f"{len(known)} of them"
    return f"{first}-{last}" if last > first else f"{first}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--initial-peers", nargs="+", required=True, metavar="MADDR", help="peers to look through: from the join line"
    )
    parser.add_argument("--run-id", metavar="ID", help="which run, where several share one network")
    parser.add_argument("--once", action="store_true", help="look once, then end")
    parser.add_argument("--json", action="store_true", help="one JSON object a look")
    parser.add_argument("--min-peers", type=int, default=0, metavar="N", help="end with exit code 1 below N peers")
    parser.add_argument("--interval", type=float, default=3.0, metavar="S", help="seconds between two looks (3)")
    parser.add_argument(
        "--join-timeout-s", type=float, default=20.0, metavar="S", help="give up joining after this long (20)"
    )
    return parser


if __name__ == "__main__":
    start(main)
