"""Flat exchange, SPTT alone, SPTT with tower modules, and TorchRec's flat exchange, over links of several rates.

    bash tools/bench_env.sh                            # once: an environment with TorchRec
    .venv-bench/bin/python tools/bench.py towers       # as root: needs network namespaces

Two hosts of two single-thread ranks (testbed.py), 26 tables x 20,000 x 64, batch 2,048 a rank, float32 messages,
row-wise Adagrad; on two of the links also with messages of 16 bits, TorchRec's by its own codecs; some also in
micro-batches, each of which travels while another computes (their exchange alone is as without). DLRM (MLPs 512-256-64
and 512-512-256-1) and a small Wukong, dense gradients averaged in float32. Two cores stand for four ranks, on a machine
with a GPU as well (NCCL takes one rank a GPU), so that slow links are what makes network and compute weigh as they do
on GPUs: each row has its compute/network ratio.
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from megarec.errors import UserError
from tools.benchmarks.testbed import NetnsHosts

HOSTS, LOCAL = 2, 2
LINKS = (0.25, 0.5, 1.0, 2.5, 0.0)  # Gbit/s; 0: unshaped
STEPS = 7
VARIANTS = ("flat", "tower", "tower, compression 2", "tower, compression 4", "tower, compression 8")
OVERLAPPED = tuple(f"{name}, 4 micro-batches" for name in ("flat", "tower, compression 4", "tower, compression 8"))
CONTESTANTS = {"dlrm": (*VARIANTS, *OVERLAPPED, "torchrec flat"), "wukong": (*VARIANTS, *OVERLAPPED)}
BITS_16 = ", 16-bit messages"  # fp16 each way: gloo's codec of TorchRec has no bf16
IN_16_BITS = {"dlrm": [name + BITS_16 for name in ("flat", "tower", "tower, compression 4", "torchrec flat")]}
LINKS_IN_16_BITS = (0.25, 1.0)


class Speedup(NamedTuple):
    """The time of one variant over that of another.

    Attributes:
        aim: what it should be at least.
    """

    model: str
    slow: str
    fast: str
    link: float
    aim: float
    key: str = "step_ms"


SPEEDUPS = {
    "step_compression_4_over_torchrec_at_0.25": Speedup("dlrm", "torchrec flat", "tower, compression 4", 0.25, 2.2),
    "step_compression_4_over_flat_at_0.25": Speedup("dlrm", "flat", "tower, compression 4", 0.25, 2.1),
    "step_compression_4_over_torchrec_at_1": Speedup("dlrm", "torchrec flat", "tower, compression 4", 1.0, 1.6),
    "exchange_compression_4_over_flat_at_1": Speedup("dlrm", "flat", "tower, compression 4", 1.0, 2.0, "exchange_ms"),
    "step_compression_8_over_torchrec_at_0.25": Speedup("dlrm", "torchrec flat", "tower, compression 8", 0.25, 2.8),
    "step_compression_8_over_torchrec_at_1": Speedup("dlrm", "torchrec flat", "tower, compression 8", 1.0, 1.8),
    "wukong_step_compression_4_over_flat_at_0.25": Speedup("wukong", "flat", "tower, compression 4", 0.25, 2.3),
}
SPTT_AT_MOST, FLAT_AT_MOST = 1.05, 0.95  # of the step of our flat exchange, of TorchRec's
# One H100 at half its bf16 peak, one NIC of 50 GB/s a GPU; the same model and batch a rank, two hosts of eight.
H100_FLOP, H100_NIC = 0.5 * 989e12, 50e9


def run(links: tuple[float, ...] = LINKS, steps: int = STEPS) -> dict[str, Any]:
    """A row for each model, variant and link, the ratios that matter, and the machine as the planner measures it.

    Raises:
        UserError: TorchRec is not installed, or this machine cannot make hosts of namespaces.
    """
    if importlib.util.find_spec("torchrec") is None:
        raise UserError(
            "benchmark towers needs TorchRec, which is not among the project's requirements: run "
            "'bash tools/bench_env.sh', then '.venv-bench/bin/python tools/bench.py towers'"
        )
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as directory, NetnsHosts(Path(directory), hosts=HOSTS, slots=LOCAL) as lab:
        machines = measure_machine(lab, Path(directory), links)
        for model, variants in CONTESTANTS.items():
            with ranks(lab, Path(directory)) as processes:
                for link in links:
                    lab.rate(1000 * link)
                    chosen = [*variants, *(IN_16_BITS.get(model, []) if link in LINKS_IN_16_BITS else [])]
                    rows += [measure(lab, processes, model, variant, link, steps) for variant in chosen]
                lab.rate(0)
    with_ratios = [row | _weights(row, rows) for row in rows]
    found, aims = ratios(rows)
    return {"name": "towers", "rows": with_ratios, "ratios": found, "aims": aims, "machines": machines}


def measure_machine(lab: NetnsHosts, directory: Path, links: Sequence[float]) -> list[dict[str, Any]]:
    """By link, what `plan --measure` finds; in ranks that have built nothing, whose threads would take time."""
    found = []
    with ranks(lab, directory) as processes:
        for link in links:
            lab.rate(1000 * link)
            found.append({"link_gbit": link, "machine": ask(processes, {"machine": True})[0]})
        lab.rate(0)
    return found


class Rank(NamedTuple):
    """A process that waits for orders, and where its errors go."""

    process: "subprocess.Popen[str]"
    log: Path


@contextmanager
def ranks(lab: NetnsHosts, directory: Path) -> Iterator[list[Rank]]:
    """Every rank's process, waiting for orders."""
    processes = []
    for rank in range(HOSTS * LOCAL):
        host = f"host{rank // LOCAL + 1}"
        environment = {
            "RANK": rank, "LOCAL_RANK": rank % LOCAL, "WORLD_SIZE": HOSTS * LOCAL, "LOCAL_SIZE": LOCAL,
            "MASTER_ADDR": lab.addresses["host1"], "MASTER_PORT": 29_400, "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        command = ["env", *(f"{name}={value}" for name, value in environment.items())]
        command += [sys.executable, "-W", "ignore", "-m", "tools.benchmarks.towers_rank"]
        path = directory / f"rank-{rank}.log"
        with path.open("w") as log:
            process = lab.start(host, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        processes.append(Rank(process, path))
    try:
        yield processes
    finally:
        for process, _ in processes:
            process.kill()
            process.wait()


def measure(
    lab: NetnsHosts, processes: list[Rank], model: str, variant: str, link: float, repetitions: int
) -> dict[str, Any]:
    """Medians over repetitions, each as long as its slowest rank.

    `cross_host_bytes` is the payload that one rank sends to the other host in an exchange, by the ledger (None for
    TorchRec); `interface_bytes` what all hosts' interfaces sent in one, headers included.
    """
    order = {"model": model, "variant": variant}
    row: dict[str, Any] = {**order, "link_gbit": link}
    for work in ("exchange", "step"):
        ask(processes, {**order, "work": work, "repetitions": 1})  # builds it, or warms it up
        before = sum(sent for sent, _ in lab.bytes().values())
        answers = ask(processes, {**order, "work": work, "repetitions": repetitions})
        slowest = [max(times) for times in zip(*(answer["ms"] for answer in answers), strict=True)]
        row[f"{work}_ms"] = statistics.median(slowest)
        if work == "exchange":
            row["cross_host_bytes"] = answers[0]["cross_host_bytes"]
            row["interface_bytes"] = (sum(sent for sent, _ in lab.bytes().values()) - before) // repetitions
    return row | {"flop": answers[0]["flop"]}


def ask(processes: list[Rank], order: dict[str, Any]) -> list[dict[str, Any]]:
    """Send an order to every rank; returns their answers.

    Raises:
        RuntimeError: a rank died.
    """
    for process, _ in processes:
        assert process.stdin is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
    answers = []
    for rank, (process, log) in enumerate(processes):
        assert process.stdout is not None
        line = process.stdout.readline()
        while line and not line.startswith("{"):
            line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"rank {rank} died at {order} (exit code {process.wait()}):\n{log.read_text()}")
        answers.append(json.loads(line))
    return answers


def _weights(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """How compute and network weigh: here, time without exchange over the time of the exchange's bytes on the link;
    and on a host of 8 H100 by the constants above."""
    if row["cross_host_bytes"] is None:
        return {"compute_over_network": None, "compute_over_network_h100": None}
    fastest = min((r for r in rows if (r["model"], r["variant"]) == (row["model"], row["variant"])), key=_step)
    compute = fastest["step_ms"] - fastest["exchange_ms"]
    network = 1e3 * row["cross_host_bytes"] * LOCAL * 8 / (row["link_gbit"] * 1e9) if row["link_gbit"] else None
    h100 = (row["flop"] / H100_FLOP) / (row["cross_host_bytes"] / H100_NIC)
    return {"compute_over_network": compute / network if network else None, "compute_over_network_h100": h100}


def _step(row: dict[str, Any]) -> float:
    return float(row["step_ms"])


def ratios(rows: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, str]]:
    """What the project aims at, where it was measured, and the aim of each; without an aim, the same in 16 bits."""
    found = {(row["model"], row["variant"], row["link_gbit"]): row for row in rows}
    result: dict[str, float] = {}
    aims: dict[str, str] = {}
    for bits, suffix in (("", ""), (BITS_16, "_in_16_bits")):
        for name, (model, slow, fast, link, aim, key) in SPEEDUPS.items():
            pair = [found.get((model, variant + bits, link)) for variant in (slow, fast)]
            if pair[0] is not None and pair[1] is not None:
                result[name + suffix] = pair[0][key] / pair[1][key]
                aims |= {} if bits else {name: f"at least {aim:g}"}
        for model, link in sorted({(row["model"], row["link_gbit"]) for row in rows}):
            prefix = "" if model == "dlrm" else f"{model}_"
            place = f"at_{link:g}" if link else "unshaped"
            for ours, theirs, name, aim in (
                ("tower", "flat", "sptt_over_flat", SPTT_AT_MOST),
                ("flat", "torchrec flat", "flat_over_torchrec", FLAT_AT_MOST),
            ):
                pair = [found.get((model, variant + bits, link)) for variant in (ours, theirs)]
                if pair[0] is not None and pair[1] is not None:
                    full = f"{prefix}{name}_{place}{suffix}"
                    result[full] = pair[0]["step_ms"] / pair[1]["step_ms"]
                    aims |= {} if bits else {full: f"at most {aim:g}"}
    return result, aims
