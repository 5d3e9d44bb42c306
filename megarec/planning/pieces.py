"""A step as pieces of work on the streams of a rank, and when each of them runs.

    lookup = Piece("lookup", "lookup", "compute", seconds=1e-3)
    pieces = [lookup, Piece("embeddings", "exchange", "exchange", seconds=2e-3, after=("lookup",))]
    found = timeline(pieces)
    found.seconds, found.exposed, found.busy

A stream runs its pieces one after the other, in the order of the list; a piece begins when the one before it on its
stream and all that it waits for have ended. A step begins while the one before still runs, as far as streams are free:
what is counted is the time between the ends of two steps once that no longer changes.
"""

from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Stream = Literal["host", "compute", "exchange", "ids", "gradients"]
"""host: the thread that starts operations; compute: the device; exchange: messages that the step waits for; ids: those
of the next batch; gradients: gradients and weights of the dense model."""
STEPS = 4  # until a step begins as the one before did


class Piece(NamedTuple):
    """Work on one stream.

    Attributes:
        name: of its own in a step.
        part: of the step, as `step_ms` names it.
        after: pieces of the same step, earlier in the list, that it waits for.
        after_last: pieces of the step before.
    """

    name: str
    part: str
    stream: Stream
    seconds: float
    after: tuple[str, ...] = ()
    after_last: tuple[str, ...] = ()


class Run(NamedTuple):
    """A piece in time; seconds from the end of the step before."""

    piece: Piece
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A step of many alike.

    Attributes:
        seconds: from the end of a step to the end of the next.
        exposed: by part, the seconds that the step waits for; they add up to `seconds`.
        busy: by part, the seconds that its pieces take, hidden ones as well.
        runs: the step's pieces in time; those that began while the step before still ran have a negative start.
    """

    seconds: float
    exposed: dict[str, float]
    busy: dict[str, float]
    runs: tuple[Run, ...]


class _Done(NamedTuple):
    piece: Piece
    start: float
    end: float
    cause: int | None  # the one that it waited for last


def timeline(pieces: Sequence[Piece]) -> Timeline:
    """When the pieces of a step run, and which of them the step waits for."""
    done, last_of_step = _play(pieces)
    last = last_of_step[-1]
    begin, end = done[last_of_step[-2]].end, done[last].end
    exposed = dict.fromkeys((piece.part for piece in pieces), 0.0)
    at: int | None = last
    while at is not None and done[at].end > begin:
        exposed[done[at].piece.part] += done[at].end - max(begin, done[at].start)
        at = done[at].cause
    busy: dict[str, float] = defaultdict(float)
    for piece in pieces:
        busy[piece.part] += piece.seconds
    own = done[len(done) - len(pieces) :]
    runs = tuple(Run(item.piece, item.start - begin, item.end - begin) for item in own)
    return Timeline(end - begin, exposed, dict(busy), runs)


def alone(pieces: Sequence[Piece], names: Container[str]) -> float:
    """Seconds of some pieces of a step, were the others done in no time."""
    own = [piece if piece.name in names else piece._replace(seconds=0.0) for piece in pieces]
    done, _ = _play(own, steps=1)
    return max(item.end for item in done)


def _play(pieces: Sequence[Piece], steps: int = STEPS) -> tuple[list[_Done], list[int]]:
    """Some steps of them, and the place of the piece that ends last in each step."""
    done: list[_Done] = []
    free: dict[Stream, int] = {}  # the last piece of a stream
    before: dict[str, int] = {}
    last_of_step = []
    for _ in range(steps):
        here: dict[str, int] = {}
        for piece in pieces:
            waits = [here[name] for name in piece.after] + [before[name] for name in piece.after_last if before]
            waits += [free[piece.stream]] if piece.stream in free else []
            cause = max(waits, key=lambda index: done[index].end, default=None)
            start = done[cause].end if cause is not None else 0.0
            here[piece.name] = free[piece.stream] = len(done)
            done.append(_Done(piece, start, start + piece.seconds, cause))
        before = here
        last_of_step.append(max(here.values(), key=lambda index: done[index].end))
    return done, last_of_step
