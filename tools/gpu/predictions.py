"""Predictions for one H200, made before anything runs there: by part and row, with the names of the parts."""

import torch

from megarec.distributed.topology import Topology
from megarec.planning import roofline
from megarec.planning.memory import predict, with_totals
from megarec.planning.zero import zero_of
from tools.gpu.context import ALONE, SIZES, ladder_row
from tools.gpu.numbers import BF16_TOLERANCE, LIMIT

DEVICE = "H200"
CEILINGS = {
    "copy, read and written": "4.3 TB/s",
    "bf16 product": "790 TFLOP/s",
    "to pin a GB": "0.4 s",
    "pinned copy to the device": "50 GB/s",
    "pinned copy to the host": "50 GB/s",
    "to start an operation": "6 us",
}
EVERY_ROW = {  # of a part, where all of its rows have the same prediction
    "parity": f"<= {LIMIT:g}, in bf16 {BF16_TOLERANCE:g}",
    "two ranks": f"<= {LIMIT:g}",
    "repeatability": "some may differ",
    "repeatability, deterministic": "0",
}
TABLES = {"triton: lookup, of a copy's rate": ">= 70 %", "triton: update, of a copy's rate": ">= 50 %"}


def predictions(size: str) -> dict[str, dict[str, str]]:
    """By part, by the name of a row ("" for all others of the part, "... what" for names with that end)."""
    sizes = SIZES[size]
    made = {name: {"": text} for name, text in EVERY_ROW.items()}
    made["ceilings"] = CEILINGS
    made["tables"] = {f"... {name}": text for name, text in TABLES.items()}
    made["ladder"], made["true rank"], made["end to end"] = {}, {}, {}
    for row, examples in sizes.ladder:
        for variant, (mfu, milliseconds) in dense_step(row, examples, size).items():
            made["ladder"] |= {f"{row} {variant} MFU": f"{100 * mfu:.0f} %"}
            made["ladder"] |= {f"{row} {variant} step of {examples:,}": f"{milliseconds:.1f} ms"}
    hosts, per_host = sizes.job
    for row in sizes.rows:
        milliseconds, gib, examples = true_rank(row, hosts, per_host, size)
        made["true rank"] |= {
            f"{row} step, rank 0 of {hosts * per_host}, {examples:,} examples": f"{milliseconds:.0f} ms"
        }
        made["true rank"] |= {f"{row} memory": f"{gib:.0f} GiB"}
    config, spec = ladder_row(sizes, sizes.run_row, *ALONE)
    whole = roofline.predict_step(config, spec, DEVICE, sizes.run_batch)
    made["end to end"] |= {
        f"{sizes.run_row} examples/s": f"{sizes.run_batch / whole.seconds:,.0f} 1/s, or the loader's 45,000",
        f"{sizes.run_row} MFU": f"{100 * whole.mfu:.0f} %",
    }
    return made


def dense_step(row: str, examples: int, size: str) -> dict[str, tuple[float, float]]:
    """(MFU, milliseconds) of the dense side on its own, as `ladder` measures it: without tables and glue."""
    config, spec = ladder_row(SIZES[size], row, *ALONE)
    parts = roofline.predict_step(config, spec, DEVICE, examples).parts
    chosen = [parts[name] for name in ("GEMMs", "products by example", "other dense", "optimizer")]
    seconds = {"eager": sum(p.seconds for p in chosen), "compiled": sum(p.fused_seconds for p in chosen)}
    flop = spec.cost.flop * examples
    return {name: (flop / taken / 989e12, 1e3 * taken) for name, taken in seconds.items()}


def true_rank(row: str, hosts: int, per_host: int, size: str) -> tuple[float, float, int]:
    """(milliseconds without links and waiting, GiB, examples) of rank 0 of a job."""
    tensor = [] if per_host % 8 == 0 else ["parallel.tensor=1", "data.batch_size=16"]
    config, spec = ladder_row(SIZES[size], row, *tensor)
    topology = Topology(0, hosts * per_host, per_host, config.parallel.tensor)
    examples = config.data.batch_size // topology.world_size
    parts = roofline.predict_step(config, spec, DEVICE, examples).parts
    chosen = [part for name, part in parts.items() if "links" not in name and name != "optimizer"]
    sizes = roofline.parameter_sizes(spec, topology)
    stepping = roofline.optimizer_bytes(config, sum(sizes), zero_of(config, topology)) / 4.3e12
    memory = predict(config, spec, topology, examples, device=torch.device("cuda"), connected=False)
    total = with_totals({**memory, "runtime": 0})["total"]
    return 1e3 * (sum(part.seconds for part in chosen) + stepping), total / 2**30, examples
