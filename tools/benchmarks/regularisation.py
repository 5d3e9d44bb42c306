"""What L2 on all rows costs: steps of one table of a million rows, beside plain torch over the whole table.

    python tools/bench.py regularisation

1,000,000 rows x 16 columns, batch 4,096, Adam, float32 but where the name says otherwise; on a GPU 128 columns and
65,536, timed by its own clock. Plain torch has a dense gradient and steps every row: torch.optim.Adam, weight_decay.
`saved` is what a save adds where decay is lazy: the decay of all rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from megarec.config.regularisation import L2Config
from megarec.config.sections import EmbeddingConfig
from megarec.data.batch import Batch
from megarec.distributed.collectives import Ledger
from megarec.distributed.topology import ONE_RANK
from megarec.sparse.layout import EmbeddingLayout
from megarec.sparse.side import SparseSide
from tools.benchmarks.interleave import interleave, median_ms, seconds_of
from tools.benchmarks.tables import steps_of
from tools.benchmarks.workload import equal_tables, quick_tables, random_batch


class Size(NamedTuple):
    rows: int
    columns: int
    batch: int


SIZES = {"cpu": Size(1_000_000, 16, 4_096), "cuda": Size(1_000_000, 128, 65_536)}
REPETITIONS = 15
RATE, WEIGHT = 1e-3, 1e-5
COUPLED = L2Config(weight=WEIGHT, rows="all")
LAZY = L2Config(weight=WEIGHT, rows="all", coupled=False)
OURS: dict[str, dict[str, Any]] = {
    "looked-up rows": {},
    "lazy decay": {"l2": LAZY},
    "all rows, L2 in the gradient": {"l2": COUPLED},
    "looked-up rows, fp16": {"weights": "fp16"},
    "looked-up rows, fp16 stochastic": {"weights": "fp16", "rounding": "stochastic"},
}


def run() -> dict[str, Any]:
    """Milliseconds a step and bytes of every contestant; all rows over plain torch, and over looked-up rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = SIZES[device.type]
    layout = equal_tables(1, size.rows, size.columns)
    batches = [random_batch(layout, size.batch, seed).to(device) for seed in range(4)]
    gradient = torch.randn(size.batch, layout.width, generator=torch.Generator().manual_seed(0)).to(device) / size.batch
    made = {name: _sparse_side(layout, settings, device) for name, settings in OURS.items()}
    contestants = {name: steps_of(_step(sparse, batches, gradient)) for name, sparse in made.items()}
    plain, held = _plain(size, batches, gradient, device)
    contestants["plain torch, all rows"] = steps_of(plain)
    seconds = interleave(contestants, REPETITIONS, device=device)
    ms = {name: median_ms(times) for name, times in seconds.items()}
    numbers = {name: sparse.memory_bytes() for name, sparse in made.items()} | {"plain torch, all rows": held}
    row = {"device": device.type, "threads": torch.get_num_threads()}
    saved = 1e3 * seconds_of(made["lazy decay"].settle, device)
    return {
        "name": "regularisation",
        "rows": [{"name": name, "step_ms": ms[name], "bytes": numbers[name], **row} for name in ms]
        + [{"name": "lazy decay, saved", "step_ms": saved, "bytes": 0, **row}],
        "ratios": {
            "all_rows_over_plain_torch": ms["all rows, L2 in the gradient"] / ms["plain torch, all rows"],
            "all_rows_over_looked_up": ms["all rows, L2 in the gradient"] / ms["looked-up rows"],
            "lazy_over_looked_up": ms["lazy decay"] / ms["looked-up rows"],
            "stochastic_over_nearest": ms["looked-up rows, fp16 stochastic"] / ms["looked-up rows, fp16"],
        },
    }


def _sparse_side(layout: EmbeddingLayout, settings: dict[str, Any], device: torch.device) -> SparseSide:
    config = EmbeddingConfig(optimizer="adam", learning_rate=RATE, **settings)
    with quick_tables(device):
        return SparseSide(layout, config, ONE_RANK, seed=0, device=device, ledger=Ledger())


def _step(sparse: SparseSide, batches: list[Batch], gradient: Tensor) -> Callable[[int], None]:
    def step(number: int) -> None:
        lookup = sparse.look_up(batches[number])
        _ = lookup.values  # waits for them and lays them out
        lookup.backward(gradient)
        lookup.apply()

    return step


def _plain(
    size: Size, batches: list[Batch], gradient: Tensor, device: torch.device
) -> tuple[Callable[[int], None], int]:
    """A step, given a batch's number, and what the table takes: weights, gradient and two moments."""
    weight = torch.empty(size.rows, size.columns, device=device).uniform_(-1e-3, 1e-3).requires_grad_()
    optimizer = torch.optim.Adam([weight], RATE, weight_decay=WEIGHT)
    ids = [next(iter(batch.ids.values())).values for batch in batches]

    def step(number: int) -> None:
        embedding(ids[number], weight).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    return step, 4 * weight.nbytes
