"""Messages of an all-to-all, piece by piece; their values are tested with the exchanges that use them."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megarec.distributed.pieces import start_exchange
from megarec.distributed.rank_pool import RankPool


def _exchange_alone(patience: float) -> str:
    """Rank 0 exchanges with a rank that does not; the group was made with a longer patience than it has now."""
    distributed_c10d._set_pg_timeout(timedelta(seconds=patience))
    if dist.get_rank() == 1:
        return ""
    sent, received = torch.zeros(4), torch.zeros(4)
    with pytest.raises(RuntimeError) as caught:
        start_exchange(sent, received, [2, 2], [2, 2], dist.group.WORLD)()
    return str(caught.value)


def test_a_message_waits_no_longer_than_its_group_says_now() -> None:
    with RankPool(2, timeout=60) as pool:
        assert "1000ms" in pool.run(_exchange_alone, 1.0)[0]
