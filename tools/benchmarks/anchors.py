"""Public figures of the field beside predictions for the nearest run that can be written down here; `bench.py planner`
prints them.

None of them was fitted on, and few are of the same run: `differs` says why a row may be off whatever the planner is
worth. A figure is a throughput, a share, a ratio or an MFU; the error is predicted over published, less one.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megarec.config.load import load_config
from megarec.config.sections import RunConfig
from megarec.data.schema import CategoricalFeature, Schema, schema_of
from megarec.planning.hardware import load_hardware
from megarec.planning.planner import Plan, plan_run
from megarec.planning.towers_pay import compare
from megarec.run.spec import resolve

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
DCN, WUKONG = CONFIGS / "mlperf-dlrm-dcnv2.json", CONFIGS / "ladder/wukong-5.6gflop.json"
DOT = 'model={"name": "dlrm", "dim": 128, "numeric_mlp": [512, 256], "head": [1024, 1024, 512, 256]}'
IN_FP32 = ("deepspeed.fp16.enabled=false", 'parallel.messages=["fp32", "fp32"]')
EXPOSED = ("ids", "exchange", "dense gradients", "check")  # parts of a step that are messages
FORTY = "cards of 40 GB, whose memory is slower; PyTorch, which does not say in which precision its products run"
DMT = "its baseline's model and batch are not public in full; ours: 16,384 examples a GPU, messages in fp16"
EMBARK = (
    "its tables and cluster; its row-wise in the host is our tower exchange with placement=row, its 3D sharding our "
    "placement=auto; its compression of messages is not in ours"
)
NESTPIPE = "its model, workers, batch and pipelining, where we overlap ids alone; "
HSTU = "many HSTU layers with fused jagged attention; ours is one layer with plain attention in front of a DLRM"


class Anchor(NamedTuple):
    """A public figure.

    Attributes:
        what: figure and run, for people.
        published: the figure, in `unit`.
        predict: what the planner says of the nearest run.
        differs: between that run and the published one.
    """

    what: str
    published: float
    unit: str
    predict: Callable[[], float]
    differs: str


def rows() -> Iterator[dict[str, Any]]:
    """A row for each figure."""
    for anchor in ANCHORS:
        predicted = anchor.predict()
        yield {
            "anchor": anchor.what, "published": anchor.published, "predicted": predicted, "unit": anchor.unit,
            "error": predicted / anchor.published - 1, "differs": anchor.differs,
        }  # fmt: skip


def _config(path: Path, kind: str, examples: int, hosts: int, *overrides: str) -> tuple[RunConfig, int]:
    ranks = int(load_hardware(kind).ranks_per_host.value)
    return load_config(path, [f"data.batch_size={examples * hosts * ranks}", *overrides]), ranks


def plan(path: Path, kind: str, examples: int, hosts: int, *overrides: str) -> Plan:
    """Of so many examples a rank, on whole hosts."""
    config, ranks = _config(path, kind, examples, hosts, *overrides)
    return plan_run(config, resolve(config, schema_of(config.data)), load_hardware(kind), hosts, ranks)


def rate(path: Path, kind: str, examples: int, *overrides: str) -> float:
    """Million examples a second on one host."""
    return plan(path, kind, examples, 1, *overrides).examples_per_second / 1e6


def share(plan: Plan, *parts: str) -> float:
    """Of a step, in percent, as far as it waits for them."""
    return 100 * sum(plan.timeline.exposed.get(part, 0.0) for part in parts) / plan.seconds


def towers_gain(*overrides: str) -> float:
    """Flat's step over the shortest one with towers, of DLRM-DCNv2 or another model over its features, on 64 H100."""
    config, ranks = _config(DCN, "h100", 16_384, 8, *overrides)
    found = compare(config, schema_of(config.data), 8, ranks, load_hardware("h100"))
    return found.variants[0].total / min(v.total for v in found.variants[1:] if v.seconds is not None)


def rows_in_hosts_over_auto(examples: int) -> float:
    """A step with every table's rows over the ranks of a host, over one with tables placed by size and lookups."""
    in_host = "parallel.exchange=tower", "parallel.towers=8", "embedding.placement=row"
    return plan(DCN, "h100", examples, 8, *in_host).seconds / plan(DCN, "h100", examples, 8).seconds


def efficiency(path: Path, examples: int, *overrides: str) -> float:
    """Examples a second and GPU on 1,536 H100 over those on one host of 8, with so many a GPU, in percent."""
    alone, many = (plan(path, "h100", examples, hosts, *overrides) for hosts in (1, 192))
    return 100 * many.examples_per_second / (192 * alone.examples_per_second)


def hstu_mfu() -> float:
    """Of one HSTU layer over 1,024 positions of 512 columns, on 16 H100, in percent."""
    items = 10_000_000
    schema = Schema(
        name="sequences, made up",
        categorical=(
            CategoricalFeature(name="item", rows=items),
            CategoricalFeature(name="history", rows=items, multi_valued=True, mean_length=1_024, newest="last"),
        ),
        numeric=("age",),
        rows={},
    )
    layer = {"features": ["history"], "target": ["item"], "block": "hstu", "max_length": 1_024, "heads": 4}
    config = RunConfig.model_validate({
        "model": {"name": "dlrm", "dim": 512, "head": [512], "sequences": [{**layer, "tables": "target"}]},
        "data": {"path": "-", "batch_size": 16 * 16},
        "embedding": {"weights": "fp16", "placement": "auto"},
        "parallel": {"messages": ["bf16", "bf16"]},
        "deepspeed": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
    })  # fmt: skip
    return 100 * plan_run(config, resolve(config, schema), load_hardware("h100"), 2, 8).mfu


ANCHORS = (
    Anchor("DLRM-DCNv2, 8 A100, 16,384 a GPU", 1.19, "M examples/s",
           lambda: rate(DCN, "a100", 16_384, *IN_FP32), f"{FORTY}; fp32 here"),
    Anchor("the same", 1.19, "M examples/s", lambda: rate(DCN, "a100", 16_384), f"{FORTY}; fp16 here"),
    Anchor("DLRM with dot products, 8 A100, 2,048 a GPU", 0.93, "M examples/s",
           lambda: rate(DCN, "a100", 2_048, DOT, *IN_FP32), f"{FORTY}; fp32 here"),
    Anchor("the same, 256 a GPU", 0.20, "M examples/s",
           lambda: rate(DCN, "a100", 256, DOT, *IN_FP32), f"{FORTY}; fp32 here; waits of Python are not in a plan"),
    Anchor("messages in a step of DLRM-DCNv2, 8 H100", 25, "%",
           lambda: share(plan(DCN, "h100", 2_112, 1), *EXPOSED), "batch: 2,112 examples a GPU here"),
    Anchor("the same, 128 H100", 51, "%", lambda: share(plan(DCN, "h100", 2_112, 16), *EXPOSED), "the same"),
    Anchor("embeddings' all-to-alls in DMT's baseline, 64 GPUs: DLRM", 27.5, "%",
           lambda: share(plan(DCN, "h100", 16_384, 8, DOT), "exchange"), DMT),
    Anchor("the same: DLRM-DCNv2", 27.5, "%", lambda: share(plan(DCN, "h100", 16_384, 8), "exchange"), DMT),
    Anchor("DMT over its baseline, 64 H100: DLRM", 1.9, "x, at most", lambda: towers_gain(DOT), DMT),
    Anchor("the same: DLRM-DCNv2", 1.9, "x, at most", towers_gain, DMT),
    Anchor("EMBark over row-wise in the host, mean", 1.5, "x", lambda: rows_in_hosts_over_auto(2_112), EMBARK),
    Anchor("the same, largest", 1.77, "x", lambda: rows_in_hosts_over_auto(16_384), EMBARK),
    Anchor("NestPipe's scaling efficiency, 1,536 workers", 94, "%",
           lambda: efficiency(WUKONG, 1_024, "embedding.placement=auto"),
           f"{NESTPIPE}5.6-GFLOP Wukong here, 1,024 examples a GPU"),
    Anchor("the same", 94, "%", lambda: efficiency(DCN, 16_384),
           f"{NESTPIPE}DLRM-DCNv2 here: its 26 tables can only be split by rows over so many ranks"),
    Anchor("MFU of HSTU, 16 H100", 31, "%", hstu_mfu, HSTU),
)  # fmt: skip
