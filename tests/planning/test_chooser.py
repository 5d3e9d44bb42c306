"""The chooser: never slower than what it was given, the same numbers unless allowed, and a config that loads."""

import json
from pathlib import Path

import pytest

from megarec.config.load import load_config
from megarec.config.sections import RunConfig
from megarec.data.schema import CategoricalFeature, Schema, schema_of
from megarec.errors import UserError
from megarec.planning.choice_report import alternative_rows, as_json, change_rows, nothing_fits, remedies
from megarec.planning.hardware import Figure, Hardware, load_hardware
from megarec.planning.planner import plan_run
from megarec.planning.search import Allowed, Chosen, Search, Specs, choose, put, settings

ROOT = Path(__file__).resolve().parents[2]
H100 = load_hardware("h100")
DLRM = "ds_configs/dlrm-criteo-terabyte.json"
NUMBERS = {"parallel.messages": "messages", "tower_module": "modules", "data.batch_size": "batch"}


def search_of(
    config: RunConfig,
    hosts: int,
    ranks: int,
    *allowed: Allowed,
    hardware: Hardware = H100,
    schema: Schema | None = None,
) -> Search:
    found = schema or schema_of(config.data)
    return Search(config, Specs(found), hardware, hosts, ranks, frozenset(allowed))


def with_memory(gigabytes: float) -> Hardware:
    return H100.model_copy(update={"memory_gb": Figure(value=gigabytes, source="made up")})


def check(chosen: Chosen, *allowed: Allowed) -> None:
    """What holds for every choice."""
    best, given = chosen.best, chosen.given
    assert best.plan is not None
    if given.plan is not None and given.plan.fits:
        assert chosen.fits and best.plan.examples_per_second >= given.plan.examples_per_second
    for key, value in best.changes.items():
        assert settings(best.config)[key] == value != settings(given.config)[key]
        assert key not in NUMBERS or NUMBERS[key] in allowed, f"{key} changes the numbers"
    for item in chosen.alternatives:
        own, there = settings(best.config), settings(item.candidate.config)
        assert [key for key in own if own[key] != there[key]] == [item.key]
    again = json.loads(json.dumps(as_json(chosen)))
    assert again["chosen"]["examples_per_second"] == best.plan.examples_per_second
    for head, rows in (change_rows(chosen), alternative_rows(chosen)):
        assert all(len(row) == len(head) for row in rows)


@pytest.mark.parametrize(
    ("hosts", "allowed", "words"),
    [
        (1, (), []),
        (1, ("messages",), ["embedding.placement=row"]),
        (4, ("messages", "modules"), ["deepspeed.zero_optimization.stage=3"]),
        (2, ("batch",), ["parallel.tensor=2", "deepspeed.gradient_accumulation_steps=4"]),
    ],
)
def test_never_slower_and_numbers_only_by_name(
    hosts: int, allowed: tuple[Allowed, ...], words: list[str], tmp_path: Path
) -> None:
    config = load_config(ROOT / DLRM, words)
    chosen = choose(search_of(config, hosts, 8, *allowed))
    check(chosen, *allowed)
    written = tmp_path / "chosen.json"
    written.write_text(chosen.best.config.model_dump_json(exclude_unset=True))
    again = load_config(written)
    assert settings(again) == settings(chosen.best.config)
    assert chosen.best.plan is not None
    made = plan_run(again, Specs(schema_of(again.data)).of(again), H100, hosts, 8)
    assert made.seconds == chosen.best.plan.seconds and made.memory == chosen.best.plan.memory


def big(rows: int = 40_000_000, count: int = 8) -> Schema:
    features = tuple(CategoricalFeature(name=f"f{i}", rows=rows) for i in range(count))
    return Schema(
        name="big", categorical=features, numeric=("x",), rows={"train": 10**9, "valid": 10**6, "test": 10**6}
    )


def test_a_model_that_one_gpu_cannot_hold() -> None:
    """A table of 164 GB: whole, it fits no GPU; the choice splits it."""
    schema = big(rows=320_000_000, count=1)
    config = load_config(ROOT / DLRM, ["data.batch_size=65536", "embedding.placement=row"])
    config = put(config, "embedding.placement", "table")
    chosen = choose(search_of(config, 1, 8, schema=schema))
    check(chosen)
    assert chosen.fits and chosen.given.plan is None, "one table for eight ranks is refused"
    assert chosen.best.changes["embedding.placement"] in ("auto", "column", "row")


def test_what_does_not_fit_gets_micro_batches_or_recomputation() -> None:
    """Memory for all but a third of the activations."""
    config = load_config(ROOT / "ds_configs/ladder/wukong-0.53gflop.json", ["embedding.placement=table"])
    free = plan_run(config, Specs(schema_of(config.data)).of(config), H100, 1, 8).memory
    tight = with_memory((free["total"] - 0.3 * free["activations"]) / 1e9)
    chosen = choose(search_of(config, 1, 8, hardware=tight))
    check(chosen)
    assert chosen.given.plan is not None and not chosen.given.plan.fits and chosen.fits
    assert {"dense.recompute", "deepspeed.gradient_accumulation_steps"} & set(chosen.best.changes)
    head, rows = change_rows(chosen)
    assert head[-1] == "why" and any("GB are missing" in row[-1] for row in rows)


def test_nothing_fits_says_what_is_missing_and_what_helps() -> None:
    config = load_config(ROOT / DLRM, [])
    search = search_of(config, 1, 8, hardware=with_memory(8))
    chosen = choose(search)
    assert not chosen.fits
    check(chosen)
    found = remedies(search, chosen.best)
    line = nothing_fits(chosen, found)
    assert "\n" not in line and "more than the 8.0 of H100" in line and "(tables " in line
    assert [r.missing for r in found] == sorted(r.missing for r in found)
    helps = [remedy for remedy in found if not remedy.missing]
    assert helps and f"the change that costs least: {helps[0].what}" in line
    assert all(remedy.plan.fits for remedy in helps)
    nowhere = search_of(config, 1, 8, hardware=with_memory(0.001))
    assert "take smaller tables or a smaller model" in nothing_fits(choose(nowhere), [])


def test_nothing_can_be_planned() -> None:
    config = load_config(ROOT / DLRM, ["data.batch_size=100"])
    with pytest.raises(UserError, match="does not divide"):
        choose(search_of(config, 2, 8))


def test_a_cpu_is_a_machine_too() -> None:
    config = load_config(ROOT / "ds_configs/dlrm-criteo-terabyte.json", ["data.batch_size=1024"])
    cpu = load_hardware("epyc-2-cores")
    check(choose(search_of(config, 2, 2, hardware=cpu, schema=big(10_000))))
