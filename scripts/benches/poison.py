"""What do poisoners cost? Held-out loss where some peers contribute something else than what they have learnt, with and
without the robust combination (swarm/averaging/robust.py), against the same peers without poisoners.

Peers of one process in lock-step (benches/lockstep.py), same seeds, same tokens. A poisoner trains and follows the
rounds as the others do, claims its tokens, and lies in what it contributes, every time. It is no false owner: who makes
something else of a part than it should is not measured here, and not caught yet.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benches import table as tables
from benches.lockstep import Peer, Simulation, average
from swarm.averaging.ledger import Contribution, Drift, Ledger
from swarm.config import RunConfig, load_run
from swarm.data.batch import Batch
from swarm.data.sources import documents
from swarm.data.stream import held_out_batches, tokenise
from swarm.data.tokenizer import load_tokenizer
from swarm.errors import PeerRefused
from swarm.host.presets import preset_path
from swarm.model.evaluate import held_out_loss
from swarm.train.run_source import load_states

NAME = "poison"
HELP = "loss with poisoners among the peers, with and without the robust combination"

TOKENS, QUICK_TOKENS = 300_000, 20_000
SWARMS = ("4:1", "8:3")
"""peers, and poisoners among them"""
HELD_OUT_SEQUENCES, QUICK_SEQUENCES = 400, 40
CLEAN = "none"
UNHEARD = "NaN"
"""no decoder lets it pass: the round goes on without"""

Attack = Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]
"""(what the poisoner has learnt, what each honest peer has) -> what it contributes; fp32 [numel] each"""


def _subtle(own: torch.Tensor, honest: list[torch.Tensor]) -> torch.Tensor:
    """In each coordinate one deviation of the honest from their median, to the side where nobody goes. That all
    poisoners say the same makes it the hardest (Baruch, Baruch, Goldberg 2019: A little is enough)."""
    rows = torch.stack(honest)
    middle = rows.median(dim=0).values
    return middle - middle.sign() * rows.std(dim=0)


ATTACKS: dict[str, Attack] = {
    "x -10": lambda own, honest: -10 * own,
    "x -1": lambda own, honest: -own,
    "x 1000": lambda own, honest: 1000 * own,
    "zeros": lambda own, honest: torch.zeros_like(own),
    "subtle": _subtle,
}


class PoisonedLedger:
    """A ledger that offers something else than what was learnt."""

    def __init__(self, ledger: Ledger, attack: Attack, honest: Callable[[torch.Tensor], list[torch.Tensor]]) -> None:
        """`honest`: what each honest peer has learnt, from the global weights."""
        self._ledger, self._attack, self._honest = ledger, attack, honest

    def contribute(self, opening_id: str, version: int) -> Contribution:
        contribution = self._ledger.contribute(opening_id, version)
        others = self._honest(self._ledger.state.weights)
        contribution.offered = self._attack(contribution.values, others)
        return contribution

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ledger, name)


class UnheardLedger:
    """Nobody waits for what it has learnt, and nothing of it is ever in a round."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def trained(self, tokens: int) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ledger, name)


class PoisonedSwarm(Simulation):
    def __init__(
        self, run: RunConfig, *, num_peers: int, tokens: torch.Tensor, attack: str, num_poisoners: int
    ) -> None:
        super().__init__(run, num_peers=num_peers, tokens=tokens)
        honest = self.peers[num_poisoners:]
        self._heard = honest if attack == UNHEARD else self.peers
        for peer in self.peers[:num_poisoners] if attack != CLEAN else []:
            ledgers: list[Any] = [
                UnheardLedger(ledger) if attack == UNHEARD
                else PoisonedLedger(ledger, ATTACKS[attack], _drifts_of(honest, index))
                for index, ledger in enumerate(peer.ledgers)
            ]
            peer.ledgers = ledgers

    def _round(self, index: int) -> None:
        opening, state, sent = average(self.run, index, self._heard, names=[peer.name for peer in self._heard])
        self.bytes_sent += sent
        self._arriving.append((index, opening, state))


def _drifts_of(peers: Sequence[Peer], fragment: int) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    drifts = [Drift(peer.held.layouts[fragment], dict(peer.held.model.named_parameters())) for peer in peers]
    return lambda weights: [drift.learnt(weights) for drift in drifts]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", help="run config (the demo run)")
    parser.add_argument("--swarms", nargs="+", default=list(SWARMS), metavar="PEERS:POISONERS", type=swarm_of)
    parser.add_argument(
        "--attacks", nargs="+", default=[*ATTACKS, UNHEARD], choices=[*ATTACKS, UNHEARD], help="which ones (all)"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"swarm tokens of each run ({TOKENS:,})")
    parser.add_argument("--tokens-per-round", type=int, help="the run's")
    parser.add_argument("--only-robust", action="store_true", help="poisoned swarms with the defence only")


def swarm_of(text: str) -> tuple[int, int]:
    peers, _, poisoners = text.partition(":")
    if not (peers.isdigit() and poisoners.isdigit() and 0 <= int(poisoners) < int(peers) <= 64):
        raise argparse.ArgumentTypeError(f"{text!r} is not PEERS:POISONERS, such as 4:1")
    return int(peers), int(poisoners)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    run = load_run(options.run or preset_path("runs/demo.yaml"))
    total, seeds = (QUICK_TOKENS, 1) if options.quick else (options.tokens, options.seeds)
    train_text, held_out_text = documents(run.data)
    tokenizer = load_tokenizer(run)
    tokens = tokenise(train_text, tokenizer)
    sequences = held_out_batches(
        tokenise(held_out_text, tokenizer), sequence_length=run.train.sequence_length,
        num_sequences_max=QUICK_SEQUENCES if options.quick else HELD_OUT_SEQUENCES,
    )
    averaging = replace(run.averaging, tokens_per_round=options.tokens_per_round or run.averaging.tokens_per_round)
    swarms = [swarm_of(swarm) if isinstance(swarm, str) else swarm for swarm in options.swarms]
    found: dict[tuple[int, int, str, bool], list[float]] = {}
    for seed in range(seeds):
        setup = replace(run, seed=seed, train=replace(run.train, total_tokens=total))
        for peers, poisoners in swarms:
            for attack, robust in cases(options.attacks, only_robust=options.only_robust):
                own = replace(setup, averaging=replace(averaging, robust=robust))
                loss = one(own, tokens, sequences, num_peers=peers, attack=attack, num_poisoners=poisoners)
                found.setdefault((peers, poisoners, attack, robust), []).append(loss)
                print(f"  seed {seed}  {poisoners if attack != CLEAN else 0} of {peers}: {attack:7}"
                      f" {'robust' if robust else 'plain ':6}  {loss:.4f}", flush=True)
    return {
        "tokens": total, "seeds": seeds, "tokens_per_round": averaging.tokens_per_round,
        "rows": [row(key, losses, found[(*key[:2], CLEAN, False)]) for key, losses in found.items()],
    }


def cases(attacks: Sequence[str], *, only_robust: bool) -> list[tuple[str, bool]]:
    """(attack, robust), the baseline first."""
    both = [(attack, robust) for attack in attacks for robust in (True, False)]
    return [(CLEAN, False), (CLEAN, True), *(case for case in both if case[1] or not only_robust)]


def one(
    run: RunConfig, tokens: torch.Tensor, sequences: Batch, *, num_peers: int, attack: str, num_poisoners: int
) -> float:
    """Held-out loss of the global weights after the run's total tokens, nats a token; infinite where nothing is left
    of them."""
    swarm = PoisonedSwarm(run, num_peers=num_peers, tokens=tokens, attack=attack, num_poisoners=num_poisoners)
    try:
        while swarm.tokens < run.train.total_tokens:
            swarm.step()
        swarm.finish()
    except PeerRefused:  # weights that are not finite cannot even be averaged
        return math.inf
    last = swarm.peers[-1]
    load_states(last.held, [ledger.state for ledger in last.ledgers])
    loss = held_out_loss(last.held.model, sequences)
    return loss if math.isfinite(loss) else math.inf


def row(key: tuple[int, int, str, bool], losses: list[float], baseline: list[float]) -> dict[str, Any]:
    """JSON knows no infinity: None is a run that was destroyed."""
    peers, poisoners, attack, robust = key
    gaps = [100 * (loss / base - 1) for loss, base in zip(losses, baseline, strict=True)]
    return {
        "peers": peers, "poisoners": 0 if attack == CLEAN else poisoners, "attack": attack, "robust": robust,
        "losses": [loss if math.isfinite(loss) else None for loss in losses],
        "gap_percent": [round(gap, 3) if math.isfinite(gap) else None for gap in gaps],
    }


def table(result: dict[str, Any]) -> str:
    def shown(values: Sequence[float | None], form: str) -> str:
        return ", ".join("destroyed" if value is None else format(value, form) for value in values)

    lines = [
        [f"{row['poisoners']} of {row['peers']}", row["attack"], "robust" if row["robust"] else "plain mean",
         shown(row["losses"], ".4f"), shown(row["gap_percent"], "+.2f")]
        for row in result["rows"]
    ]
    header = ["poisoners", "they contribute", "combined by", "held-out loss of each seed", "gap of each seed, %"]
    return "\n".join([
        tables.markdown(header, lines), "",
        f"{result['tokens']:,} tokens, {result['tokens_per_round']:,} a round;"
        " gaps are to the plain mean without poisoners",
    ])
