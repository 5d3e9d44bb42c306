"""A choice for people: what it changes, what each change is worth, what else was near; what to do when nothing fits.

Rows are texts, for the terminal and for the page; `as_json` has the same for programs.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megarec.config.sections import RunConfig
from megarec.planning.planner import Plan
from megarec.planning.search import Candidate, Chosen, Search, put, settings
from megarec.planning.sweep import MOST_HOSTS, on_hosts, with_batch

PARTS = ("lookup", "exchange", "tower modules", "dense compute", "tensor links", "dense gradients", "update")
CHANGES_NUMBERS = {
    "parallel.messages": "rounds embeddings and gradients on the wire",
    "tower_module": "another model",
    "data.batch_size": "another batch: learning rates may have to follow",
}
Table = tuple[list[str], list[list[str]]]


class Remedy(NamedTuple):
    """A change outside of the choice that lets the run fit.

    Attributes:
        what: for people.
        missing: bytes, if it is not enough.
    """

    what: str
    plan: Plan
    missing: int
    ranks: int


def told(value: Any) -> str:
    """A setting's value in few words."""
    if isinstance(value, dict):
        if "stage" in value:
            others = [key if own is True else f"{key}={own}" for key, own in value.items() if key != "stage" and own]
            return " ".join([f"stage {value['stage']}", *others])
        return f"{value.get('name')} {value.get('compression', '')}".strip()
    if isinstance(value, list | tuple):
        return "/".join(map(str, value))
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _costs(plan: Plan, base: Plan, parts: Sequence[str]) -> list[str]:
    """Milliseconds and memory of a row."""
    exposed = plan.timeline.exposed
    own = [f"{1e3 * exposed[name]:,.1f}" if exposed.get(name, 0.0) > 0 else "" for name in parts]
    share = plan.seconds / plan.examples / (base.seconds / base.examples)
    fits = f"{plan.memory['total'] / 1e9:,.1f}" + ("" if plan.fits else " (does not fit)")
    return [*own, f"{1e3 * plan.seconds:,.1f}", f"{share:.2f}", fits]


def change_rows(chosen: Chosen) -> Table:
    """Every setting: as given, as chosen, and what the change back would cost."""
    given, best = settings(chosen.given.config), settings(chosen.best.config)
    undone = {item.key: item.candidate for item in chosen.alternatives if item.value == given[item.key]}
    rows = []
    for key, value in best.items():
        worth = ""
        if key in chosen.best.changes:
            worth = _worth(undone.get(key), chosen.best)
            if key in CHANGES_NUMBERS:
                worth += f"; {CHANGES_NUMBERS[key]}"
        rows.append([key, told(given[key]), told(value) if key in chosen.best.changes else "the same", worth])
    return ["setting", "given", "chosen", "why"], rows


def _worth(back: Candidate | None, best: Candidate) -> str:
    assert best.plan is not None
    if back is None or back.plan is None:
        return "goes with the others"
    if back.missing:
        return f"without it {back.missing / 1e9:,.1f} GB are missing"
    change = back.plan.seconds / back.plan.examples / (best.plan.seconds / best.plan.examples) - 1
    return f"without it a step takes {change:.1%} longer"


def alternative_rows(chosen: Chosen) -> Table:
    """The choice, the config as given, and the choice with each setting changed."""
    assert chosen.best.plan is not None
    base = chosen.best.plan
    plans = [("chosen", "", base)]
    if chosen.given.plan is not None and chosen.best.changes:
        plans.append(("as given", "", chosen.given.plan))
    for item in chosen.alternatives:
        assert item.candidate.plan is not None
        plans.append((item.key, told(item.value), item.candidate.plan))
    parts = [name for name in PARTS if any(plan.timeline.exposed.get(name, 0.0) > 0 for *_, plan in plans)]
    rows = [[key, value, *_costs(plan, base, parts)] for key, value, plan in plans]
    return ["one change", "value", *parts, "total", "of the choice", "GB"], rows


def as_json(chosen: Chosen) -> dict[str, Any]:
    """The choice for programs."""

    def short(found: Candidate) -> dict[str, Any]:
        if found.plan is None:
            return {"not_possible": found.impossible}
        plan = found.plan
        return {
            "fits": plan.fits,
            "memory_bytes": plan.memory["total"],
            "step_ms": {name: 1e3 * own for name, own in plan.timeline.exposed.items()} | {"total": 1e3 * plan.seconds},
            "examples_per_second": plan.examples_per_second,
            "mfu": plan.mfu,
        }

    return {
        "looked_at": chosen.looked_at,
        "changes": chosen.best.changes,
        "settings": settings(chosen.best.config),
        "given": short(chosen.given),
        "chosen": short(chosen.best),
        "alternatives": [
            {"key": item.key, "value": item.value, **short(item.candidate)} for item in chosen.alternatives
        ],
    }


def remedies(search: Search, best: Candidate) -> list[Remedy]:
    """Changes beyond the search, each alone, that let the best config fit: first those that need no more ranks, then
    by how many examples a second they leave; where none is enough, by what is still missing."""
    found, enough = list[Remedy](), set[str]()
    for kind, what, config, hosts in _changes(search, best.config):
        if kind in enough:
            continue
        own = Search(config, search.specs, search.hardware, hosts, search.ranks_per_host, search.allowed)
        made = own.candidate(config)
        if made.plan is not None:
            found.append(Remedy(what, made.plan, made.missing, own.ranks))
            enough |= set() if made.missing else {kind}
    return sorted(found, key=lambda r: (r.missing, r.ranks, -r.plan.examples_per_second))


def _changes(search: Search, config: RunConfig) -> Iterator[tuple[str, str, RunConfig, int]]:
    """(kind, for people, config, hosts); of a kind the mildest first."""
    embedding, hosts = config.embedding, search.hosts
    if embedding.weights == "fp32":
        half = embedding.model_copy(update={"weights": "fp16"})
        yield (
            "weights",
            "embedding.weights=fp16 (rounds the tables)",
            config.model_copy(update={"embedding": half}),
            hosts,
        )
    if embedding.optimizer in ("adam", "adagrad"):
        rows = embedding.model_copy(update={"optimizer": "rowwise_adagrad"})
        yield "optimizer", "embedding.optimizer=rowwise_adagrad", config.model_copy(update={"embedding": rows}), hosts
    size = config.data.batch_size
    while size % (2 * search.ranks) == 0:
        size //= 2
        yield "batch", f"data.batch_size={size}", put(with_batch(config, size), _ACCUMULATION, 1), hosts
    while hosts < MOST_HOSTS:
        hosts *= 2
        yield "hosts", f"{hosts} hosts", put(on_hosts(config, hosts), _ACCUMULATION, 1), hosts


_ACCUMULATION = "deepspeed.gradient_accumulation_steps"


def nothing_fits(chosen: Chosen, found: Sequence[Remedy]) -> str:
    """One line: what is missing, by how much, and which change costs least."""
    assert chosen.best.plan is not None
    line = f"nothing fits: of {chosen.looked_at:,} configs the smallest needs {missing_of(chosen.best.plan)}; "
    enough = [remedy for remedy in found if not remedy.missing]
    if enough:
        others = f" (or {enough[1].what})" if len(enough) > 1 else ""
        return f"{line}the change that costs least: {enough[0].what}{others}"
    if found:
        line += f"even {found[0].what} leaves {found[0].missing / 1e9:,.1f} missing: "
    return f"{line}take smaller tables or a smaller model"


def missing_of(plan: Plan) -> str:
    """What a plan that does not fit needs on its largest rank, for which parts most, and how much is missing."""
    largest = sorted(((size, name) for name, size in plan.memory.items() if name not in _NO_PART), reverse=True)
    parts = ", ".join(f"{name} {size / 1e9:,.1f}" for size, name in largest[:3] if size > 0)
    need = plan.memory["total"]
    return (
        f"{need / 1e9:,.1f} GB on its largest rank ({parts}), {(need - plan.available) / 1e9:,.1f} more than the "
        f"{plan.available / 1e9:,.1f} of {plan.hardware.name}"
    )


_NO_PART = ("total", "model_states", "snapshot")
