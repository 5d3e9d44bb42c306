"""The fastest way to run a model on a job: which of its settings to change, what each change is worth, and why.

    found = choose(Search(config, Specs(schema), load_hardware("h100"), hosts=8, ranks_per_host=8))
    found.best.config, found.best.plan.seconds, found.alternatives

Two groups of settings are searched in turn, each as a whole, until neither finds better: how the dense model is shared
(tensor ways, ZeRO, recomputation, micro-batches) and how the tables are (exchange and towers, placement, messages). A
config that fits comes before one that does not, the fewer bytes are missing the better; then examples a second count.
In the end each change is taken back that is worth less than `WORTH`. The given config is among those that are compared,
so that the choice is never slower.

Nothing changes what the model computes unless that is allowed by name (`Allowed`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from megarec.config.sections import MessageType, RunConfig
from megarec.config.towers import IdentityTowerConfig
from megarec.data.schema import Schema
from megarec.dense.settings import settings_of
from megarec.errors import UserError
from megarec.planning.hardware import Hardware
from megarec.planning.planner import Plan, check_machine, plan_run
from megarec.planning.towers_pay import COMPRESSIONS, with_towers
from megarec.run.spec import ModelSpec, resolve

Allowed = Literal["messages", "modules", "batch"]
"""messages: 16-bit embeddings on the wire; modules: tower modules, another model; batch: another batch size."""
WORTH = 0.01  # of the step: a change that gains less is left out
MOST_MICRO_BATCHES = 64
ROUNDS = 3
PLACEMENTS = ("auto", "table", "column", "row")
ZERO: tuple[dict[str, Any], ...] = (
    {"stage": 0},
    {"stage": 1},
    {"stage": 1, "overlap_comm": True},
    {"stage": 2},
    {"stage": 2, "overlap_comm": True},
    {"stage": 3},
)


class Candidate(NamedTuple):
    """One way to run the model.

    Attributes:
        changes: by key, what differs from the given config.
        plan: None where it cannot be run; `impossible` says why.
    """

    config: RunConfig
    changes: dict[str, Any]
    plan: Plan | None
    impossible: str | None = None

    @property
    def missing(self) -> int:
        """Bytes that the largest rank lacks."""
        assert self.plan is not None
        return max(0, self.plan.memory["total"] - self.plan.available)

    @property
    def order(self) -> tuple[float, float]:
        """The least is the best."""
        if self.plan is None:
            return float("inf"), float("inf")
        return float(self.missing), 1 / self.plan.examples_per_second


class Alternative(NamedTuple):
    """The best config with one setting changed, and the value that this setting then has."""

    key: str
    value: Any
    candidate: Candidate


@dataclass(frozen=True)
class Chosen:
    """The outcome of a search.

    Attributes:
        given: the config as it came.
        best: the choice; it may not fit, where nothing does.
        alternatives: to each of its settings, fastest first.
        looked_at: configs that were compared.
    """

    given: Candidate
    best: Candidate
    alternatives: tuple[Alternative, ...]
    looked_at: int

    @property
    def fits(self) -> bool:
        return self.best.plan is not None and self.best.plan.fits


class Specs:
    """The model of every config that differs in towers alone, resolved once: plans of one model share their work."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._found: dict[str, ModelSpec] = {}

    def of(self, config: RunConfig) -> ModelSpec:
        """The model of a config.

        Raises:
            UserError: features, towers and sizes do not fit together.
        """
        key = f"{config.parallel.exchange} {config.parallel.towers} {config.tower_module.model_dump_json()}"
        if key not in self._found:
            self._found[key] = resolve(config, self._schema)
        return self._found[key]


@dataclass
class Search:
    """Candidates of one model on one job, each planned once."""

    config: RunConfig
    specs: Specs
    hardware: Hardware
    hosts: int
    ranks_per_host: int
    allowed: frozenset[Allowed] = frozenset()
    _seen: dict[str, Candidate] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return self.hosts * self.ranks_per_host

    @property
    def seen(self) -> int:
        return len(self._seen)

    def candidate(self, config: RunConfig) -> Candidate:
        """The plan of a config, or why there is none."""
        key = config.model_dump_json()
        if key not in self._seen:
            changes = {name: value for name, value in settings(config).items() if settings(self.config)[name] != value}
            try:
                check_machine(config, self.hardware, self.hosts, self.ranks_per_host)
                if config.dense.compile and settings_of(config.deepspeed).stage == 3:
                    raise UserError("dense.compile is not for ZeRO-3")
                plan = plan_run(config, self.specs.of(config), self.hardware, self.hosts, self.ranks_per_host)
                self._seen[key] = Candidate(config, changes, plan)
            except UserError as error:
                self._seen[key] = Candidate(config, changes, None, str(error))
        return self._seen[key]

    def dense(self, config: RunConfig) -> Iterator[RunConfig]:
        """Ways to share the dense model; of each, as few micro-batches as fit, and no recomputation where none is
        needed."""
        for tensor in (ways for ways in _divisors(self.ranks_per_host) if ways <= self.hardware.ranks_per_host.value):
            for zero in zeros(config, self.config):
                shared = with_zero(_with(config, "parallel", tensor=tensor), zero)
                for recompute in _recomputations(config):
                    *_, last = made = list(self._micro_batches(_with(shared, "dense", recompute=recompute)))
                    yield from made
                    own = self.candidate(last)
                    if own.plan is None or (own.plan.fits and len(made) == 1):
                        break

    def _micro_batches(self, config: RunConfig) -> Iterator[RunConfig]:
        """Up to the first that fits."""
        count, most = 1, config.data.batch_size // self.ranks
        while True:
            made = with_micro_batches(config, count)
            yield made
            found = self.candidate(made)
            if found.plan is None or found.plan.fits or count >= MOST_MICRO_BATCHES or most % (2 * count):
                return
            count *= 2

    def sparse(self, config: RunConfig) -> Iterator[RunConfig]:
        """Ways to share the tables."""
        given = self.config
        messages = dict.fromkeys([config.parallel.messages, given.parallel.messages, *self._messages()])
        for shared in self._exchanges(config):
            for placement in dict.fromkeys([config.embedding.placement, given.embedding.placement, *PLACEMENTS]):
                placed = _with(shared, "embedding", placement=placement)
                for wire in messages:
                    yield _with(placed, "parallel", messages=wire)

    def _messages(self) -> list[tuple[MessageType, MessageType]]:
        return [("fp16", "bf16")] if "messages" in self.allowed else []

    def _exchanges(self, config: RunConfig) -> Iterator[RunConfig]:
        yield config
        given = self.config
        if isinstance(given.tower_module, IdentityTowerConfig) or "modules" in self.allowed:
            plain = _with(config, "parallel", exchange="flat", towers=given.parallel.towers)
            yield plain.model_copy(update={"tower_module": IdentityTowerConfig()})
        if self.hosts == 1:
            return
        wanted: list[float | None] = [None] if isinstance(given.tower_module, IdentityTowerConfig) else []
        if "modules" in self.allowed:
            wanted = [None, *COMPRESSIONS]
        kept = config.model_copy(update={"tower_module": given.tower_module})
        kept = _with(kept, "parallel", towers=given.parallel.towers)
        for compression in wanted:
            yield with_towers(kept, self.hosts, compression)
        if not isinstance(given.tower_module, IdentityTowerConfig):
            yield _with(kept, "parallel", exchange="tower")
            yield _with(kept, "parallel", exchange="flat")

    def batches(self, config: RunConfig) -> Iterator[RunConfig]:
        """Larger and smaller global batches, by powers of two."""
        if "batch" in self.allowed:
            for times in (0.25, 0.5, 2.0, 4.0):
                size = int(config.data.batch_size * times)
                if size >= self.ranks and size % self.ranks == 0:
                    yield _with(config, "data", batch_size=size)

    def best_of(self, configs: Iterator[RunConfig], start: Candidate) -> Candidate:
        """The best of some, or the one to start from."""
        return min([start, *(self.candidate(config) for config in configs)], key=lambda found: found.order)


def choose(search: Search) -> Chosen:
    """Search for the fastest config that fits.

    Raises:
        UserError: no config can be planned at all: the job, the batch or the machine does not fit together.
    """
    given = best = search.candidate(search.config)
    groups: tuple[Callable[[RunConfig], Iterator[RunConfig]], ...] = (search.sparse, search.dense, search.batches)
    for _ in range(ROUNDS):
        before = best
        for group in groups:
            best = search.best_of(group(best.config), best)
        if best is before:
            break
    if best.plan is None:
        raise UserError(given.impossible or "nothing can be planned")
    best = _without_idle_changes(search, given, best)
    return Chosen(given, best, tuple(_alternatives(search, best)), search.seen)


def _without_idle_changes(search: Search, given: Candidate, best: Candidate) -> Candidate:
    """Take changes back that are worth less than `WORTH`, the whole of them at most."""
    assert best.plan is not None
    limit = best.plan.seconds / best.plan.examples * (1 + WORTH)
    if given.plan is not None and given.plan.fits:
        limit = min(limit, given.plan.seconds / given.plan.examples)
    for key in list(best.changes):
        if key not in best.changes:
            continue
        back = search.candidate(put(best.config, key, settings(search.config)[key]))
        if back.plan is None or back.missing > best.missing:
            continue
        if back.plan.seconds / back.plan.examples <= limit:
            best = back
    return best


def _alternatives(search: Search, best: Candidate) -> Iterator[Alternative]:
    """Of each setting the other values, the best first."""
    own = settings(best.config)
    made: dict[str, dict[str, Candidate]] = {key: {} for key in own}
    for group in (search.sparse, search.dense, search.batches):
        for config in list(group(best.config)):
            found, there = search.candidate(config), settings(config)
            differs = [key for key in own if own[key] != there[key]]
            if len(differs) == 1 and found.plan is not None:
                made[differs[0]][str(there[differs[0]])] = found
    for key, by_value in made.items():
        for found in sorted(by_value.values(), key=lambda found: found.order):
            yield Alternative(key, settings(found.config)[key], found)


def settings(config: RunConfig) -> dict[str, Any]:
    """What a search may change, by key."""
    zero = {key: value for key, value in config.deepspeed.get("zero_optimization", {}).items() if key in _ZERO_KEYS}
    module = config.tower_module
    return {
        "parallel.tensor": config.parallel.tensor,
        "deepspeed.zero_optimization": {"stage": 0, **zero},
        "deepspeed.gradient_accumulation_steps": config.deepspeed.get("gradient_accumulation_steps", 1),
        "dense.recompute": config.dense.recompute,
        "parallel.exchange": config.parallel.exchange,
        "tower_module": None if isinstance(module, IdentityTowerConfig) else module.model_dump(exclude_none=True),
        "embedding.placement": config.embedding.placement,
        "parallel.messages": list(config.parallel.messages),
        "data.batch_size": config.data.batch_size,
    }


_ZERO_KEYS = ("stage", "overlap_comm", "zero_hpz_partition_size", "offload_optimizer", "offload_param")


def put(config: RunConfig, key: str, value: Any) -> RunConfig:
    """A config with one of its `settings` at another value."""
    section, _, name = key.partition(".")
    if key == "deepspeed.zero_optimization":
        return with_zero(config, value)
    if key == "deepspeed.gradient_accumulation_steps":
        return with_micro_batches(config, value)
    if key == "tower_module":
        module = {"name": "identity"} if value is None else value
        return RunConfig.model_validate({**config.model_dump(), "tower_module": module})
    return _with(config, section, **{name: tuple(value) if name == "messages" else value})


def _recomputations(config: RunConfig) -> tuple[Literal["none", "selective", "full"], ...]:
    """A dense section beside `deepspeed.optimizer` is refused: then it stays as it is."""
    if "optimizer" in config.deepspeed:
        return (config.dense.recompute,)
    return ("none", "selective", "full")


def zeros(*configs: RunConfig) -> list[dict[str, Any]]:
    """ZeRO's settings to compare: the configs' own first."""
    found: list[dict[str, Any]] = []
    for zero in (*(settings(config)["deepspeed.zero_optimization"] for config in configs), *ZERO):
        if zero not in found:
            found.append(zero)
    return found


def with_zero(config: RunConfig, zero: dict[str, Any]) -> RunConfig:
    """Buckets and other keys of the section stay as they are."""
    kept = config.deepspeed.get("zero_optimization", {})
    kept = {key: value for key, value in kept.items() if key not in _ZERO_KEYS}
    return config.model_copy(update={"deepspeed": {**config.deepspeed, "zero_optimization": {**zero, **kept}}})


def with_micro_batches(config: RunConfig, count: int) -> RunConfig:
    """The same batch in so many micro-batches; sizes that would then be wrong are left to be derived."""
    derived = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    section = {key: value for key, value in config.deepspeed.items() if key not in derived}
    if count > 1:
        section["gradient_accumulation_steps"] = count
    return config.model_copy(update={"deepspeed": section})


def _with(config: RunConfig, section: str, **values: Any) -> RunConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _divisors(number: int) -> list[int]:
    return [ways for ways in range(1, number + 1) if number % ways == 0]
