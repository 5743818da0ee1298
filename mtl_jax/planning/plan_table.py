"""A plan as text: a table of quantities, the most expensive places of every step, and advice if a model does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import tabulate

from mtl_jax.core.errors import count
from mtl_jax.planning.run_plan import PhaseCost, Plan
from mtl_jax.planning.topologies import Topology

PLACES = 10


def table(plans: Sequence[Plan]) -> str:
    """The plans of a run side by side, and remarks below them.

    Args:
        plans: A plan for each topology.
    """
    columns = [_column(plan.topology, phase) for plan in plans for phase in plan.phases]
    heads = [f"{plan.topology.name}\n{phase.phase}" for plan in plans for phase in plan.phases]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    parts = [tabulate.tabulate(rows, ["a device, a step", *heads], tablefmt="github", disable_numparse=True)]
    for plan in plans:
        parts += [text for phase in plan.phases if (text := _places(plan.topology, phase))]
        parts.append("\n".join(_remarks(plan)))
    return "\n\n".join(parts)


def _column(item: Topology, phase: PhaseCost) -> dict[str, str]:
    cost = phase.cost
    cycles = None if cost is None else cost.cycles
    collectives = {} if cost is None else cost.collectives
    sent = ", ".join(f"{kind} x {value.times}: {_size(value.bytes)}" for kind, value in collectives.items())
    return {
        "memory": f"{_size(phase.memory)} of {_size(item.chip.memory)}, {'fits' if phase.fits else 'does not fit'}",
        "of that parameters": _size(phase.parameters),
        "of that optimizer, averages, rule": _size(phase.optimizer),
        "of that activations, temporaries": _or_none(phase.temporaries, _size),
        "operations": _or_none(phase.flops, lambda flops: f"{flops / 1e9:,.2f} G"),
        "cycles": _or_none(cycles, lambda value: f"{value / 1e6:,.2f} M"),
        "fused kernels take about": f"{phase.fused_cycles / 1e6:,.2f} M cycles" if phase.fused_cycles else "none",
        "time": _or_none(phase.seconds, lambda seconds: f"{1e3 * seconds:,.3f} ms"),
        "share of the chip's arithmetic": _or_none(share(item, phase), lambda part: f"{part:.1%}"),
        "kernels": _or_none(None if cost is None else cost.kernels, lambda number: f"{number:,.0f}"),
        "communication": sent or "none",
        "communication takes at least": _or_none(phase.communication, lambda seconds: f"{1e3 * seconds:,.3f} ms"),
        "compiled here in": f"{phase.compile_seconds:.0f} s",
    }


def share(item: Topology, phase: PhaseCost) -> float | None:
    """The share of the chip's bfloat16 arithmetic that a step uses while it computes; None without cycles."""
    if not phase.seconds or phase.flops is None:
        return None
    return phase.flops / (phase.seconds * item.chip.flops)


def _places(item: Topology, phase: PhaseCost) -> str:
    if phase.cost is None or not phase.cost.cycles:
        return ""
    dearest = list(phase.cost.places.items())[:PLACES]
    rows = [[name, f"{cycles / 1e6:,.3f} M", f"{cycles / phase.cost.cycles:.1%}"] for name, cycles in dearest]
    return tabulate.tabulate(
        rows, [f"dearest places, {item.name} {phase.phase}", "cycles", "share"], tablefmt="github", disable_numparse=True
    )


def _remarks(plan: Plan) -> list[str]:
    name, lines = plan.topology.name, []
    timed = [phase for phase in plan.phases if phase.seconds]
    hours = plan.hours()
    if timed and hours is not None:
        busy = sum(phase.steps * (phase.seconds or 0.0) for phase in timed)
        steps = sum(phase.steps for phase in timed)
        lines.append(
            f"{name}: {plan.tokens * steps / busy:,.0f} tokens a second, padding included, and {_time(hours)} for "
            f"{count(steps, 'step')} of {count(plan.rows, 'row')}. The compiler's estimate in {plan.dtype}: without "
            "communication, evaluation, input and waiting"
        )
    if plan.note:
        lines.append(f"{name}: {plan.note}")
    for phase in plan.phases:
        if phase.fused_cycles and phase.cost is not None:
            places = count(len(phase.cost.fused), "place")
            lines.append(
                f"{name} {phase.phase}: the compiler estimates no cycles of fused kernels, in {places}; the time has what "
                "their operations or bytes take (docs/accelerators.md has what a kernel alone takes)"
            )
        if phase.cost is not None and phase.cost.unknown_loops:
            loops = count(phase.cost.unknown_loops, "loop")
            lines.append(f"{name} {phase.phase}: the rounds of {loops} depend on the data and count as one")
        if phase.fits and phase.flops is None:
            lines.append(f"{name} {phase.phase}: without operations, as the compiler counts a loop over parts of a batch once")
        if not phase.fits:
            lines.append(f"{name} {phase.phase} does not fit: {advice(plan, phase)}")
    return lines


def advice(plan: Plan, phase: PhaseCost) -> str:
    """Advice on how to make a phase fit into the memory.

    It is assumed that activations grow with the rows that are processed at once.
    """
    room = plan.topology.chip.memory - phase.parameters - phase.optimizer
    shards = len(plan.topology.devices)
    cut = ", or cut them over the devices (--sharding fsdp)" if plan.sharding == "replicated" and shards > 1 else ""
    if room <= 0:
        return (
            f"parameters and the optimizer's state alone are {_size(phase.parameters + phase.optimizer)}; train fewer "
            f"parameters (--phases with frozen layers, adapters such as LoRA) or choose a smaller trunk{cut}"
        )
    others = phase.memory - phase.parameters - phase.optimizer
    parts = 2 ** math.ceil(math.log2(max(others / room, 1.0001)))
    of_device = plan.rows // shards
    fitting = next((n for n in range(parts * plan.accumulate, of_device + 1) if of_device % n == 0), None)
    remat = "; --remat layers keeps fewer activations" if plan.remat == "none" else ""
    if fitting is None:
        return f"not even one row of a batch fits on a device; --batch.row-length below {plan.tokens // plan.rows}{remat}"
    return f"try --batch.accumulate {fitting}, or --rows {plan.rows * plan.accumulate // fitting // shards * shards}{remat}"


def _or_none(value: float | None, shown: Callable[[float], str]) -> str:
    return "not estimated" if value is None else shown(value)


def _size(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:,.0f} B"


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:,.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:,.1f} seconds"
