"""A plan's step as an event timeline: the trace that Chrome (chrome://tracing) and Perfetto (ui.perfetto.dev) open.

    write_trace(plan, Path("step.json"))

One process, a thread a stream; pieces that began while the step before still ran come before 0. Two steps are written,
the second the image of the first, so that what reaches from one into the next is seen. An arrow leads from a piece to
each that waits for it on another stream.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from megarec.errors import UserError
from megarec.files import write_json
from megarec.planning.pieces import Run, Stream, Timeline
from megarec.planning.planner import Plan

STREAMS: tuple[Stream, ...] = get_args(Stream)
NAMES: dict[Stream, str] = {
    "host": "host thread: starts operations",
    "compute": "device",
    "exchange": "messages that the step waits for",
    "ids": "ids of the next batch",
    "gradients": "gradients and weights of the dense model",
}
STEPS = 2


def streams_of(timeline: Timeline) -> list[Stream]:
    """The streams that have work, in the order of the trace."""
    used = {run.piece.stream for run in timeline.runs}
    return [stream for stream in STREAMS if stream in used]


def trace_events(plan: Plan) -> dict[str, Any]:
    """The trace as an object of Chrome's Trace Event Format; times in microseconds."""
    found = plan.timeline
    title = f"PREDICTED: a rank of {plan.hosts} hosts x {plan.ranks_per_host} {plan.hardware.name}"
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": title}}]
    threads = {stream: place for place, stream in enumerate(streams_of(found))}
    for stream, place in threads.items():
        events.append(
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": place, "args": {"name": f"{stream} ({NAMES[stream]})"}}
        )
        events.append({"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": place, "args": {"sort_index": place}})
    for step in range(STEPS):
        offset = step * found.seconds
        events += [_event(run, step, offset, threads[run.piece.stream]) for run in found.runs if run.end > run.start]
        events += _arrows(found, step, threads)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"predicted": True, "step_ms": 1e3 * found.seconds},
    }


def write_trace(plan: Plan, path: Path) -> None:
    """Write it.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_json(path, trace_events(plan))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def _event(run: Run, step: int, offset: float, thread: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": run.piece.name,
        "cat": run.piece.part,
        "pid": 0,
        "tid": thread,
        "ts": _us(run.start + offset),
        "dur": _us(run.end - run.start),
        "args": {"part": run.piece.part, "step": step, "ms": 1e3 * (run.end - run.start)},
    }


def _arrows(found: Timeline, step: int, threads: dict[Stream, int]) -> Iterator[dict[str, Any]]:
    """From the end of a piece to the start of one on another stream that waits for it."""
    by_name = {run.piece.name: run for run in found.runs}
    for run in found.runs:
        waits = [(name, step) for name in run.piece.after]
        waits += [(name, step - 1) for name in run.piece.after_last if step]
        for name, when in waits:
            cause = by_name[name]
            if cause.piece.stream == run.piece.stream or cause.end == cause.start or run.end == run.start:
                continue
            common = {"name": "waits", "cat": "waits", "pid": 0, "id": f"{step} {name} {run.piece.name}"}
            ends = when * found.seconds + cause.end
            yield {**common, "ph": "s", "tid": threads[cause.piece.stream], "ts": _us(ends)}
            yield {**common, "ph": "f", "bp": "e", "tid": threads[run.piece.stream],
                   "ts": _us(step * found.seconds + run.start)}  # fmt: skip


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 3)
