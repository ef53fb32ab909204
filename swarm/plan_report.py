"""What `python -m swarm.plan` has found, in lines for people. Pure: its figures come in as plain data."""

from __future__ import annotations

from typing import Any

from swarm.units import format_bytes, format_count, format_seconds

DAY_S = 86_400


def lines(result: dict[str, Any], *, tables: bool = False) -> list[str]:
    what = "adapters of" if result["adapters"] else "weights:"
    return [
        f"{result['run']}: {what} {format_count(result['trained_parameters'])} parameters in {result['fragments']} "
        f"fragments, {format_count(result['tokens'])} tokens, {result['rounds']} rounds of each fragment", "",
        "Enough to hold every fragment once:",
        *(line for machine in result["machines"] for line in _machine(machine, tables=tables)), "",
        *(_outlooks(result) if result["lines"] else []),
        *_traffic(result),
        *([] if result["lines"] else ["", "--line 20/100/30ms or --topology home-100 adds speed, days and money"]),
    ]  # fmt: skip


def _machine(machine: dict[str, Any], *, tables: bool) -> list[str]:
    peers = machine["peers"]
    others = f", and others for {_listed(machine['too_large'])}" if machine["too_large"] else ""
    enough = f"{_count(len(peers), 'peer')}{others}" if peers else "too little for any fragment"
    found = [f"  {machine['machine']}: {enough}"]
    for same in _grouped(peers):
        one = same[0]
        held = "{}:{}".format(one["fragments"][0], same[-1]["fragments"][1])
        each = one["fragments"][1] - one["fragments"][0]
        who = held if len(same) == 1 else f"{held}, {_count(each, 'fragment')} each"
        needs = f"{format_bytes(one['gpu_bytes'])} GPU, " if one["gpu_bytes"] else ""
        found.append(
            f"    {who}: {needs}{format_bytes(one['main_bytes'])} main, "
            f"{_count(one['in_flight'], 'microbatch')} at once, "
            f"sends {format_bytes(max(peer['sent_bytes'] for peer in same))} in all "
            f"({format_bytes(one['averaging_bytes'])} rounds, {format_bytes(one['pipeline_bytes'])} stages)"
        )
        found += [f"      {one['settings']}", *(_indented(one["table"]) if tables else [])]
    if machine["too_large"] and (tables or not peers):
        found += [f"    fragment {machine['too_large'][0]} alone would take", *_indented(machine["short_of"])]
    return found


def _outlooks(result: dict[str, Any]) -> list[str]:
    found = [f"With {_count(result['replicas'], 'peer')} for each fragment, on {result['lines']}:"]
    for machine in result["machines"]:
        outlook = machine["outlook"]
        if outlook is None:
            found.append(f"  {machine['machine']}: these machines alone cannot hold the model")
            continue
        found.append(
            f"  {machine['machine']}: {_count(outlook['machines'], 'machine')}, {outlook['computer']} at "
            f"{outlook['flop_per_s'] / 1e12:.3g} TFLOP/s"
        )
        found += [f"    {line}" for line in (*_speed(outlook), *_rounds(outlook), _cost(outlook, result["prices"]))]
    if any(machine["outlook"] for machine in result["machines"]):
        found.append("  assumed, unless you say: which GPU, what it gets done, watts, the price of a kWh")
    return [*found, ""]


def _speed(outlook: dict[str, Any]) -> list[str]:
    bounds = {what: outlook[f"{what}_tokens_per_s"] for what in ("computing", "line", "memory")}
    said = ", ".join(f"{what} {_rate(rate)}" for what, rate in bounds.items() if rate is not None)
    few = f", {outlook['least_in_flight']} at once in the fullest stage" if "memory" in outlook["bound_by"] else ""
    return [
        f"{_rate(outlook['tokens_per_s'])} tokens/s, bound by {outlook['bound_by']}{few}",
        f"  (each bound alone would allow: {said})",
    ]


def _rounds(outlook: dict[str, Any]) -> list[str]:
    if not outlook["wire_bytes"]:
        return ["alone there is nothing to average"]
    hidden = (
        f"hidden behind training, {_percent(outlook['round_share'])} of the line's time and "
        f"{_percent(outlook['core_share'])} of a core"
    )
    late = "lines or cores cannot keep up, so rounds come later than the run says"
    found = [
        f"a round of a fragment takes {_time(outlook['round_s'])}, every {_time(outlook['period_s'])}: "
        + (hidden if outlook["hidden"] else late)
    ]
    if outlook["opened_by_time"]:
        found.append(
            f"  opened by max_round_s (their tokens take {_time(outlook['due_s'])}): {outlook['num_rounds']:,} rounds "
            "in all, and their traffic"
        )
    return found


def _cost(outlook: dict[str, Any], prices: dict[str, float]) -> str:
    seconds = outlook["seconds"]
    lasts = format_seconds(seconds) if seconds < 2 * DAY_S else f"{seconds / DAY_S:,.1f} days"
    rent = f", {_sum(outlook['rent'])} for rent at {prices['gpu_hour']:g} a GPU-hour" if prices["gpu_hour"] else ""
    return (
        f"{lasts}; a machine sends {format_bytes(outlook['sent_bytes'])}; {_sum(outlook['kwh'])} kWh, "
        f"{_sum(outlook['electricity'])} at {prices['kwh']:g} a kWh{rent}"
    )


def _traffic(result: dict[str, Any]) -> list[str]:
    rows = result["comparison"]
    width = max(len(row["what"]) for row in rows)
    return [
        "Sent by a machine in the whole run, with "
        f"{_count(result['replicas'], 'peer')} for each fragment (as much comes in):",
        f"  a round of the whole model: {format_bytes(result['round_bytes'])} a contribution; between stages: "
        f"{result['forward_bytes_per_token']:.0f} bytes a token on, {result['back_bytes_per_token']:.0f} back",
        f"  {'':<{width}}  {'sent':>8}  {'bf16 data parallelism':>21}  times less",
        *(
            f"  {row['what']:<{width}}  {format_bytes(row['bytes']):>8}  {format_bytes(row['ddp_bytes']):>21}  "
            f"{row['times_less']:>10,.0f}" for row in rows if row["times_less"]
        ),
    ]  # fmt: skip


def _grouped(peers: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Neighbours that hold as much in the same way are one line, with the first one's figures."""
    groups: list[list[dict[str, Any]]] = []
    for peer in peers:
        def kind(one: dict[str, Any]) -> tuple[Any, ...]:
            return one["fragments"][1] - one["fragments"][0], one["settings"], one["main_bytes"], one["gpu_bytes"]

        if groups and kind(groups[-1][0]) == kind(peer):
            groups[-1].append(peer)
        else:
            groups.append([peer])
    return groups


def _indented(text: str) -> list[str]:
    return [f"      | {line}" for line in text.splitlines()]


def _count(number: int, what: str) -> str:
    plural = what + ("es" if what.endswith("ch") else "s")
    return f"{number} {what if number == 1 else plural}"


def _listed(fragments: list[int]) -> str:
    shown = ", ".join(map(str, fragments[:6])) + (" ..." if len(fragments) > 6 else "")
    return f"fragment{'' if len(fragments) == 1 else 's'} {shown}"


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.2g}" if tokens_per_s < 10 else f"{tokens_per_s:,.0f}"


def _sum(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 60 else format_seconds(seconds)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
