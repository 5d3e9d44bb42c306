"""One process as one rank of a larger job: torch's fake process group stands for the other ranks.

A fake collective moves nothing. torch fills what a rank receives from what it sends; where that would be another
rank's kind of data, as in our exchange, it is put right here: every other rank is taken to be a copy of this one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megarec.dense.engine import agreement_by
from megarec.distributed.process import rank_device
from megarec.planning.recorder import process_group


@contextmanager
def fake_job(rank: int, world_size: int) -> Iterator[None]:
    """This process is rank `rank` of `world_size` inside `with`; there must be no process group yet.

    Enter it before any mode that records collectives, which then sees them as they are.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with (
            _CopiesOfThisRank(),
            agreement_by(_from_rank_0),
        ):
            yield
    finally:
        dist.destroy_process_group()


class _CopiesOfThisRank(TorchDispatchMode):
    """All-to-all: from every rank arrives the block that this rank sends to itself, cut or repeated to fit.

    So ids that arrive belong to this rank's tables, and lengths agree with the number of values that follow.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.c10d.alltoall_base_.default:
            received, sent, _, output_sizes, input_sizes = args[:5]
            group = process_group(args)
            assert group is not None
            own = sent.split(list(input_sizes) or sent.shape[0] // group.size())[group.rank()]
            for block in received.split(list(output_sizes) or received.shape[0] // group.size()):
                _repeat(own, block)
        return result


def _repeat(source: torch.Tensor, target: torch.Tensor) -> None:
    """Fill a vector with the elements of another one, as often as needed; with zeros where that is empty."""
    if not source.numel():
        target.zero_()
        return
    whole = target.shape[0] // source.shape[0] * source.shape[0]
    target[:whole].view(-1, *source.shape).copy_(source)
    target[whole:].copy_(source[: target.shape[0] - whole])


def _from_rank_0(ints: list[int]) -> list[int]:
    """DeepSpeed's checks that rank 0 has the same integers send the same messages, but here no rank 0 can object."""
    dist.broadcast(torch.tensor(ints, device=rank_device()), src=0)
    return ints
