"""What a step moves, by the roofline, against counts of what runs; and the predictions against a review by hand."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megarec.config.load import load_config
from megarec.config.models import WukongConfig
from megarec.config.sections import RunConfig
from megarec.data.schema import schema_of
from megarec.dense.parallelize import parallelize
from megarec.dense.tensor_parallel import shard_mlps
from megarec.distributed.collectives import Ledger, build_channel
from megarec.distributed.process import start_process
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import ONE_RANK, build_topology
from megarec.errors import UserError
from megarec.models.blocks import MLP
from megarec.models.wukong import Wukong
from megarec.planning import roofline
from megarec.planning.op_counts import OpCounter, fused
from megarec.planning.zero import zero_of
from megarec.run.spec import ModelSpec, resolve
from tests.device.small_wukong import EMBEDDINGS, EXAMPLES, WUKONG
from tests.processes import python

ROOT = Path(__file__).resolve().parents[2]
MICROSECOND = 1e6


def ladder(row: str, *overrides: str) -> tuple[RunConfig, ModelSpec]:
    config = load_config(ROOT / f"ds_configs/ladder/wukong-{row}gflop.json", list(overrides))
    return config, resolve(config, schema_of(config.data))


def test_dense_bytes_and_kernels_are_those_of_the_simulated_device() -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    done = python("-m", "tests.device.dense_bytes", cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    with torch.device("meta"), OpCounter() as counter:
        model = Wukong(EMBEDDINGS, WUKONG)
        x = torch.empty(EXAMPLES, EMBEDDINGS, WUKONG.dim, requires_grad=True)
        made = len(counter.ops)
        model(x).sum().backward()
    ops = counter.ops[made:]
    twice = sum(size for op in ops if op.name == "native_layer_norm_backward" for size in op.reads.values()) // 2
    assert sum(op.bytes for op in ops) - twice == pytest.approx(sum(seen["bytes"].values()), rel=0.1)
    assert len(ops) == pytest.approx(seen["kernels"], rel=0.1)
    flop = sum(op.flop for op in ops)
    assert flop == sum(op.flop for op in ops if op.kind != "memory") > 0


def test_bytes_of_one_operation() -> None:
    with torch.device("meta"), OpCounter() as counter:
        a, b = torch.empty(4, 6), torch.empty(6, 5)
        out = torch.empty(4, 5)
        torch.mm(a, b, out=out)
        out.add_(1)
        a.expand(3, 4, 6).sum()
        out.zero_()
        a.T.contiguous()
        torch._foreach_mul_([a, b], 2.0)
    expected = [("mm", 4 * (24 + 30 + 20)), ("add_", 4 * 40), ("sum", 4 * 25), ("zero_", 4 * 20)]
    expected += [("clone", 4 * 48), ("_foreach_mul_", 4 * 2 * 54)]
    assert [(op.name, op.bytes) for op in counter.ops] == expected
    assert counter.ops[0].kind == "gemm" and counter.ops[0].flop == 2 * 4 * 6 * 5


def test_a_fused_run_reads_what_others_made_and_writes_what_others_read() -> None:
    with torch.device("meta"), OpCounter() as counter:
        x, w = torch.empty(8, 4), torch.empty(4, 4)
        y = x @ w
        kept = y.relu()
        z = kept.exp().sin()
        _ = z @ w
        _ = kept @ w
    first, run, *_ = fused(counter.ops)
    assert (first.kind, run.name) == ("gemm", "fused")
    assert (sum(run.reads.values()), sum(run.writes.values())) == (4 * 32, 2 * 4 * 32)


WIDE = WukongConfig(dim=16, layers=2, num_fm=8, num_lcb=8, rank=8, mlp=[256, 256], head=[128])
STAGES = [(stage, bf16) for stage in range(4) for bf16 in (False, True)]


def stepped(stage: int, bf16: bool, clip: float) -> tuple[float, float, float]:
    """On a rank: counted bytes a parameter, operations a parameter, and the bytes that the roofline says."""
    section = {"stage": stage, "reduce_bucket_size": 10**6}
    config = RunConfig.model_validate(
        {
            "model": WIDE.model_dump(),
            "data": {"path": "", "batch_size": 4},
            "deepspeed": {"zero_optimization": section, "bf16": {"enabled": bf16}, "gradient_clipping": clip},
        }
    )
    device = start_process(config)
    with torch.device("meta"):
        dense = parallelize(Wukong(20, WIDE), config, build_topology(1, 1), device, Ledger())
        plain = Wukong(20, WIDE).to(dense.dtype)
    sizes = [getattr(p, "ds_numel", p.numel()) for p in dense.module.parameters()]
    for _ in range(2):  # the first one makes the optimizer's state
        loss = dense.engine(torch.randn(4, 20, 16, dtype=dense.dtype)).float().sum()
        with OpCounter() as counter:
            dense.engine.backward(loss)
            dense.engine.step()
    loss = plain.to_empty(device="cpu")(torch.randn(4, 20, 16, dtype=dense.dtype)).float().sum()
    with OpCounter() as without:
        loss.backward()
    travelling = sum(op.bytes for op in counter.ops if op.name in ("allreduce_", "_reduce_scatter_base_"))
    moved = sum(op.bytes for op in counter.ops) - sum(op.bytes for op in without.ops) - travelling
    calls = len(counter.ops) - len(without.ops)
    predicted = roofline.optimizer_bytes(config, sum(sizes), zero_of(config, ONE_RANK))
    return moved / sum(sizes), calls / len(sizes), predicted / sum(sizes)


@pytest.mark.parametrize(("stage", "bf16"), STAGES)
def test_bytes_of_deepspeeds_step(stage: int, bf16: bool, rank_pool: Callable[[int], RankPool]) -> None:
    (moved, calls, predicted) = rank_pool(1).run(stepped, stage, bf16, 1.0)[0]
    assert predicted == pytest.approx(moved, rel=0.1)
    assert roofline.STEP_BYTES[stage, bf16].launches == pytest.approx(calls, rel=0.25)


MLP_SIZES = [(24, [8, 16], 6), (24, [8], 6), (24, [], 6)]


def tensor_traffic() -> list[int]:
    """On each of two ranks: bytes sent by forward and backward of every MLP."""
    found = []
    for inputs, hidden, outputs in MLP_SIZES:
        ledger = Ledger()
        channel = build_channel(build_topology(2, 2), "tensor", ledger)
        model = nn.ModuleDict({"mlp": MLP(inputs, hidden, outputs)})
        shard_mlps(model, channel)
        model["mlp"](torch.randn(5, inputs, requires_grad=True)).sum().backward()
        found.append(sum(row["bytes"] for row in ledger.rows()))
    return found


def test_bytes_of_tensor_parallel_layers(rank_pool: Callable[[int], RankPool]) -> None:
    sent = rank_pool(2).run(tensor_traffic)[0]
    for (inputs, hidden, outputs), counted in zip(MLP_SIZES, sent, strict=True):
        columns = roofline.tensor_columns(MLP(inputs, hidden, outputs), 2)
        assert 4 * 5 * sum(columns) == counted


# us an example at 790 TFLOP/s and 4.3 TB/s, of forward and backward: GEMMs, and what is bound by memory.
REVIEW = {"0.53": (0.56, 0.73), "2.12": (1.82, 2.05), "5.6": (6.35, 3.13), "22.23": (28.70, 6.13), "108": (145.7, 13.2)}


@pytest.mark.parametrize("row", REVIEW)
def test_the_ladder_as_a_review_worked_it_out_by_hand(row: str) -> None:
    config, spec = ladder(row)
    ops = roofline.dense_ops(config, spec, examples=256)
    gemms = sum(op.flop for op in ops if op.kind == "gemm") / 256 / 790e12
    # Of a batch this small the weights would count: only what has the batch's size.
    large = roofline.dense_ops(config, spec, examples=512)
    moved = sum(op.bytes for op in large if op.kind != "gemm") - sum(op.bytes for op in ops if op.kind != "gemm")
    assert MICROSECOND * gemms == pytest.approx(REVIEW[row][0], rel=0.06)
    assert MICROSECOND * moved / 256 / 4.3e12 == pytest.approx(REVIEW[row][1], rel=0.25)


def test_parts_add_up_and_say_what_bounds_them() -> None:
    config, spec = ladder("5.6")
    step = roofline.predict_step(config, spec, "H200", 8192)
    assert list(step.parts) == [
        "GEMMs", "products by example", "other dense", "exchange glue", "table lookup", "table update", "optimizer",
    ]  # fmt: skip
    assert step.seconds == pytest.approx(sum(part.seconds for part in step.parts.values()))
    assert step.parts["GEMMs"].bound == "compute" and step.parts["other dense"].bound == "memory"
    assert step.parts["exchange glue"].bytes == roofline.GLUE_BYTES_A_COLUMN * spec.layout.width * 8192
    assert step.mfu == pytest.approx(spec.cost.flop * 8192 / step.seconds / 989e12)
    assert 0 < step.mfu < step.fused_mfu < 0.8
    few = roofline.predict_step(config, spec, "H200", 8)
    assert few.parts["other dense"].bound == "launches"


def test_ranks_of_a_host_share_and_talk() -> None:
    config, spec = ladder("22.23")  # tensor 8
    step = roofline.predict_step(config, spec, "H200", 2048)
    assert step.ranks == 8 and step.parts["dense links"].bound == "link"
    assert 0.06 < step.parts["dense links"].seconds < 0.12  # the review: about 90 ms
    alone = roofline.predict_step(*ladder("22.23", "parallel.tensor=1"), "H200", 2048)
    assert "dense links" not in alone.parts
    assert alone.parts["GEMMs"].flop == step.parts["GEMMs"].flop


@pytest.mark.parametrize(
    ("device", "overrides", "batch", "message"),
    [
        ("", [], 64, r"--roofline : no such machine is known"),
        ("H200", ["data.batch_size=6", "parallel.ranks_per_host=4"], None, r"size=6 does not divide by 4 ranks"),
        ("H20", [], 64, r"--roofline H20: no such machine.*did you mean 'h200'.*all: a100, a40, b200"),
        ("H200", ["deepspeed.gradient_accumulation_steps=4"], 6, r"--batch 6 does not divide.*steps=4: take 8"),
        ("epyc-2-cores", [], 64, r"EPYC, 2 cores: its 16-bit rate is not known.*switch deepspeed\.bf16 off"),
        (
            "H200",
            ['deepspeed={"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}'],
            64,
            "offload_optimizer is not in its model",
        ),
    ],
)
def test_what_is_not_known_is_said(device: str, overrides: list[str], batch: int | None, message: str) -> None:
    config, spec = ladder("0.53", *overrides)
    with pytest.raises(UserError, match=message):
        roofline.predict_step(config, spec, device, batch)


def test_the_tool_prints_parts_and_json() -> None:
    command = ["tools/flops.py", "--config", "ds_configs/ladder/wukong-0.53gflop.json", "--roofline", "H200"]
    command += ["--batch", "4096"]
    shown = python(*command, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert "exchange glue" in shown.stdout and "PREDICTED, NOT MEASURED: 4,096 examples" in shown.stdout
    found: dict[str, Any] = json.loads(python(*command, "--json", cwd=ROOT).stdout)
    assert found["roofline"]["parts"]["optimizer"]["bound"] in ("memory", "launches")
    assert found["training_flop_per_example"] > 0
    for words, said in (
        (["--ladder", "--roofline", "H200"], "--roofline goes with --config"),
        ([*command[1:3], "--batch", "4"], "--batch goes with --roofline"),
        ([*command[1:5], "--batch", "0"], "--batch 0: expected at least 1"),
    ):
        refused = python("tools/flops.py", *words, cwd=ROOT)
        assert (refused.returncode, refused.stdout) == (2, "") and said in refused.stderr
