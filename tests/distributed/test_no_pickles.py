"""Nothing that another rank sends is unpickled: to unpickle is to run what the sender likes."""

import json
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megarec.config.load import load_config
from megarec.data.sources.synthetic import Shape, prepare_synthetic
from megarec.distributed import collectives
from megarec.distributed.collectives import gather_texts, raise_together
from megarec.distributed.rank_pool import RankPool
from megarec.distributed.topology import NAME_BYTES, build_topology
from megarec.errors import UserError
from megarec.training.trainer import train

ROOT = Path(__file__).parents[2]
OBJECT_COLLECTIVES = re.compile(r"\b\w*(gather|broadcast|scatter|send|recv|reduce)_object\w*")
Pools = Callable[[int], RankPool]


def test_no_object_collective_is_called_anywhere() -> None:
    for folder in ("megarec", "tools", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            found = OBJECT_COLLECTIVES.search(path.read_text(encoding="utf-8"))
            assert found is None, f"{path}: {found[0]} pickles; see gather_texts in megarec/distributed/collectives.py"


def train_without_pickles(path: Path, stage: int) -> float:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle between ranks")

    distributed_c10d._tensor_to_object = refuse
    distributed_c10d._object_to_tensor = refuse
    config = load_config(path, [f"deepspeed.zero_optimization.stage={stage}"])
    steps: float = train(config, resume=False, started=time.time())["train"]["steps"]
    return steps


def test_a_whole_run_pickles_nothing(rank_pool: Pools, tmp_path: Path) -> None:
    """DeepSpeed and torch neither, at any stage, with start, validation, save, and the test at the end."""
    prepare_synthetic(Shape(examples=500, seed=2), tmp_path / "data")
    model = {"layers": 1, "num_fm": 2, "num_lcb": 2, "rank": 4, "mlp": [8], "dim": 8}
    data = {"path": str(tmp_path / "data"), "batch_size": 100}
    run = {"model": model, "data": data, "train": {"max_steps": 2, "output_dir": str(tmp_path / "out")}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    for stage in (0, 3):
        assert rank_pool(2).run(train_without_pickles, tmp_path / "run.json", stage) == [2, 2]


def names_under(hostname: str) -> str:
    names = hostname.split("|")
    socket.gethostname = lambda: names[dist.get_rank()]  # type: ignore[assignment]
    try:
        return build_topology(None, 1).describe()
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("a|a|b|b", "2 hosts x 2 local ranks"),
        ("a|a|a|b", "machines run unequal numbers of ranks (a: 3, b: 1)"),
        ("a|b|a|b", "ranks of one machine are not consecutive (a, b, a, b)"),
        ("ü|ü|ü|ü", "1 hosts x 4 local ranks"),
        ("|".join(["x" * 400] * 4), "1 hosts x 4 local ranks"),
        ("|||", "1 hosts x 4 local ranks"),
    ],
)
def test_hosts_have_names_of_bounded_length(rank_pool: Pools, names: str, expected: str) -> None:
    assert NAME_BYTES >= 255
    for found in rank_pool(4).run(names_under, names):
        assert expected in found


def texts_of(mine: list[str]) -> tuple[dict[int, str], str]:
    topology, cpu = build_topology(2, 1), torch.device("cpu")
    texts = gather_texts(mine[topology.rank], topology, cpu)
    try:
        raise_together(UserError(mine[1]) if topology.rank == 1 else None, topology, cpu)
    except UserError as error:
        return texts, str(error)
    return texts, "no error"


@pytest.mark.parametrize("text", ["a rank's remark", "ü" * 100, "", "a \udcff name"])
def test_texts_arrive(rank_pool: Pools, text: str) -> None:
    arrived = text.encode(errors="replace").decode()
    expected = ({1: arrived} if text else {}, str(UserError(text)))
    assert rank_pool(2).run(texts_of, ["", text]) == [expected, expected]


def test_a_text_is_cut_at_the_bound(rank_pool: Pools) -> None:
    for texts, error in rank_pool(2).run(texts_of, ["", "ü" * collectives.TEXT_BYTES]):
        assert len(texts[1].encode()) == collectives.TEXT_BYTES
        assert error == str(UserError("ü" * collectives.TEXT_BYTES))


def announce(size: int) -> str:
    topology = build_topology(2, 1)
    sizes = torch.empty(2, dtype=torch.int64)
    if topology.rank == 1:
        dist.all_gather_single(sizes, torch.tensor([size]), group=topology.world)
        return ""
    try:
        gather_texts("", topology, torch.device("cpu"))
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("size", [1 << 40, -1])
def test_a_rank_cannot_make_the_others_allocate(rank_pool: Pools, size: int) -> None:
    found = rank_pool(2).run(announce, size)[0]
    assert found == f"rank 1 announced a text of {size} bytes; expected at most {collectives.TEXT_BYTES}"
