"""What an evaluation found: one dictionary for --json, the same as lines for people and as a table for a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from swarm.units import printable

Report = dict[str, Any]


def lines(report: Mapping[str, Any]) -> list[str]:
    """For a terminal."""
    found = []
    for title, head, rows in tables(report):
        widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
        found += ["", f"{title}:"]
        for row in [head, *rows]:
            cells = [cell.ljust(width) if place == 0 else cell.rjust(width)
                     for place, (cell, width) in enumerate(zip(row, widths, strict=True))]
            found.append("  " + "   ".join(cells).rstrip())
    for warning in report.get("warnings", []):
        found += ["", f"note: {printable(warning)}"]
    return found[1:] if found and found[0] == "" else found


def markdown(report: Mapping[str, Any]) -> str:
    """For a model card; empty where nothing was measured."""
    found = []
    for title, head, rows in tables(report):
        found += [f"**{title}**", "", "| " + " | ".join(head) + " |", "|-|" + "-:|" * (len(head) - 1)]
        found += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        found.append("")
    found += [f"- Note: {printable(warning)}." for warning in report.get("warnings", [])]
    return "\n".join(found).strip()


def tables(report: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, heads, rows of cells) of what was measured."""
    found: list[tuple[str, list[str], list[list[str]]]] = []
    if report.get("held_out"):
        rows = [[
            f"{loss['source']}, {loss['objective']}", f"{loss['nats_per_token']:.4f}", f"{loss['nats_per_byte']:.4f}",
            f"{loss['targets']:,}",
        ] for loss in report["held_out"]]
        head = ["source, objective", "nats a token", "nats a byte", "tokens"]
        found.append(("Loss on text that no peer trained on", head, rows))
    if report.get("tasks"):
        found.append(("Held-out examples of its own tasks", _HEAD, _scores(report["tasks"])))
    if report.get("raft"):
        rows = [*_scores(report["raft"]), [
            "average", *(f"{100 * report['raft_average'][key]:.1f}" for key in ("quasi_exact_match", "macro_f1")),
            str(sum(score["questions"] for score in report["raft"])),
        ]]
        found.append(("RAFT, 5 examples shown, three trials", _HEAD, rows))
    if report.get("lm_eval"):
        rows = [[task, metric, f"{value:.4f}"] for task, metrics in report["lm_eval"].items()
                for metric, value in metrics.items()]
        found.append(("lm-evaluation-harness", ["task", "metric", "value"], rows))
    return found


_HEAD = ["task", "quasi-exact match, %", "macro-F1, %", "questions"]


def _scores(scores: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [[
        score["name"], f"{100 * score['quasi_exact_match']:.1f}", f"{100 * score['macro_f1']:.1f}",
        str(score["questions"]),
    ] for score in scores]
