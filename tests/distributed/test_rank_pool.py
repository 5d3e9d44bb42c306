import os
import time

import pytest
import torch
import torch.distributed as dist

from megarec.distributed import rank_pool
from megarec.distributed.rank_pool import RankError, RankPool


def sum_of_ranks(offset: int) -> tuple[int, int, int, torch.Tensor]:
    total = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), torch.get_num_threads(), total


def fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()  # waits for a rank that never comes


def die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def die_slowly_on_rank_one() -> None:
    """As the kernel may take its time between the sockets of a process that ended and the pipe to its parent."""
    if dist.get_rank() == 1:
        time.sleep(0.5)
        os._exit(7)
    raise RuntimeError("Connection closed by peer")


def sleep_on_rank_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def unpicklable() -> object:
    return lambda: None


def test_results_come_by_rank_and_the_ranks_stay() -> None:
    with RankPool(2) as pool:
        for offset in (0, 10):
            first, second = pool.run(sum_of_ranks, offset)
            assert (first[:3], second[:3]) == ((0, 2, 1), (1, 2, 1))
            assert first[3].item() == second[3].item() == 1 + 2 * offset
        with pytest.raises(RankError, match="unpicklable failed on rank"):
            pool.run(unpicklable)
        assert pool.closed


def test_the_end_of_with_ends_the_ranks() -> None:
    with RankPool(1) as pool:
        processes = list(pool._processes)
        assert processes[0].is_alive()
    assert not processes[0].is_alive()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            fail_on_rank_one,
            r"fail_on_rank_one failed on rank 1 of 2:\n(.*\n)*.*raise ValueError.*\nValueError: the reason",
        ),
        (die_on_rank_one, r"rank 1 of 2 died \(exit code 7\)"),
        (die_slowly_on_rank_one, r"rank 1 of 2 died \(exit code 7\)"),
        (sleep_on_rank_one, r"no answer from rank (0, )?1 of 2 within 2 s"),
    ],
)
def test_a_failure_names_its_rank_and_ends_the_pool_at_once(  # type: ignore[no-untyped-def]
    function, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if function is die_slowly_on_rank_one:  # how slowly, that depends on what else the machine does
        monkeypatch.setattr(rank_pool, "SECONDS_TO_DIE", 15.0)
    pool = RankPool(2, timeout=30)
    processes = list(pool._processes)
    pool.timeout = 2 if function is sleep_on_rank_one else 30
    start = time.monotonic()
    with pytest.raises(RankError, match=message):
        pool.run(function)
    assert time.monotonic() - start < 20
    assert pool.closed
    assert not any(process.is_alive() for process in processes)
    with pytest.raises(RankError, match="closed"):
        pool.run(sum_of_ranks, 0)
