"""How a plan scales: the same run over hosts, batch sizes, compressions, tensor ways and ZeRO stages.

    for curve in sweeps(config, schema, hardware, hosts=8, ranks_per_host=8):
        curve.name, [(point.at, point.seconds) for point in curve.points]

Hosts come in two curves: with the global batch as it is (strong scaling), and with the examples of a rank as they are
(weak scaling). Efficiency is examples a second for each rank, over those on the fewest hosts of the curve that fit. A
point that cannot be run is not in its curve; one that does not fit says so.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from megarec.config.sections import RunConfig
from megarec.config.towers import IdentityTowerConfig
from megarec.data.schema import Schema
from megarec.errors import UserError
from megarec.planning.hardware import Hardware
from megarec.planning.planner import Plan, check_machine, plan_run
from megarec.planning.search import Specs, with_zero
from megarec.planning.towers_pay import COMPRESSIONS, with_towers

MOST_HOSTS = 512
HOSTS = tuple(2**power for power in range(10))
BATCHES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


class Point(NamedTuple):
    """A plan of a curve.

    Attributes:
        at: on the curve's axis.
        parts: seconds of a step by part, as far as it waits for them.
        efficiency: examples a second and rank, over those of the curve's first point that fits.
    """

    at: float
    ranks: int
    fits: bool
    memory: int
    seconds: float
    examples_per_second: float
    mfu: float
    parts: dict[str, float]
    efficiency: float


class Curve(NamedTuple):
    """One setting varied, all others as in the run.

    Attributes:
        axis: what `Point.at` counts.
    """

    name: str
    axis: str
    points: tuple[Point, ...]

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "axis": self.axis, "points": [point._asdict() for point in self.points]}


def sweeps(
    config: RunConfig,
    schema: Schema,
    hardware: Hardware,
    hosts: int,
    ranks_per_host: int,
    on: Sequence[int] = HOSTS,
) -> list[Curve]:
    """All curves that have at least two points.

    Args:
        on: hosts of the two scaling curves, beside the run's own.

    Raises:
        UserError: a figure of the machine is not known.
    """
    specs = Specs(schema)

    def plan(own: RunConfig, count: int = hosts) -> Plan | None:
        try:
            check_machine(own, hardware, count, ranks_per_host)
            return plan_run(own, specs.of(own), hardware, count, ranks_per_host)
        except UserError:
            return None

    share = config.data.batch_size // (hosts * ranks_per_host)
    counts = sorted({*on, hosts})
    tensor = [ways for ways in range(1, ranks_per_host + 1) if ranks_per_host % ways == 0]
    curves = [
        _curve("hosts, the same batch", "hosts", ((count, plan(on_hosts(config, count), count)) for count in counts)),
        _curve(
            "hosts, the same examples a rank",
            "hosts",
            (
                (count, plan(with_batch(on_hosts(config, count), share * count * ranks_per_host), count))
                for count in counts
            ),
        ),
        _curve(
            "batch",
            "examples a step",
            (
                (size, plan(with_batch(config, size)))
                for size in (int(config.data.batch_size * times) for times in BATCHES)
            ),
        ),
        _curve("tensor ways", "ranks of a tensor group", ((ways, plan(with_tensor(config, ways))) for ways in tensor)),
        _curve("ZeRO stage", "stage", ((stage, plan(with_stage(config, stage))) for stage in range(4))),
    ]
    if hosts > 1:
        compressed = ((times, plan(with_towers(config, hosts, times))) for times in COMPRESSIONS)
        curves.append(_curve("compression of tower modules", "compression", compressed))
    return [curve for curve in curves if len(curve.points) > 1]


def on_hosts(config: RunConfig, hosts: int) -> RunConfig:
    """Towers without modules that were a number follow the hosts: they change no number that the model computes."""
    parallel, bare = config.parallel, isinstance(config.tower_module, IdentityTowerConfig)
    if parallel.exchange == "tower" and isinstance(parallel.towers, int) and bare and parallel.towers % hosts:
        return config.model_copy(update={"parallel": parallel.model_copy(update={"towers": hosts})})
    return config


def with_batch(config: RunConfig, size: int) -> RunConfig:
    """The run with another global batch; sizes of the deepspeed section that would contradict it are left out."""
    section = {key: value for key, value in config.deepspeed.items() if not key.startswith("train_")}
    data = config.data.model_copy(update={"batch_size": size})
    return config.model_copy(update={"data": data, "deepspeed": section})


def with_tensor(config: RunConfig, ways: int) -> RunConfig:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"tensor": ways})})


def with_stage(config: RunConfig, stage: int) -> RunConfig:
    given = config.deepspeed.get("zero_optimization", {})
    kept = {key: value for key, value in given.items() if key == "overlap_comm"} if stage else {}
    return with_zero(config, {**kept, "stage": stage})


def _curve(name: str, axis: str, plans: Iterable[tuple[float, Plan | None]]) -> Curve:
    found = [(at, plan) for at, plan in plans if plan is not None]
    base = next((plan for _, plan in found if plan.fits), found[0][1] if found else None)
    return Curve(name, axis, tuple(_point(at, plan, base) for at, plan in found if base is not None))


def _point(at: float, plan: Plan, base: Plan) -> Point:
    def of_a_rank(own: Plan) -> float:
        return own.examples_per_second / (own.hosts * own.ranks_per_host)

    return Point(
        at=at,
        ranks=plan.hosts * plan.ranks_per_host,
        fits=plan.fits,
        memory=plan.memory["total"],
        seconds=plan.seconds,
        examples_per_second=plan.examples_per_second,
        mfu=plan.mfu,
        parts=plan.timeline.exposed,
        efficiency=of_a_rank(plan) / of_a_rank(base),
    )
