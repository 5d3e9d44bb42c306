"""What the ledger says crosses hosts is what the hosts' interfaces send."""

from pathlib import Path

from tools.benchmarks.testbed import NetnsHosts
from tools.benchmarks.towers import HOSTS, LOCAL, measure, ranks
from tools.benchmarks.towers_rank import BATCH, COLUMNS, TABLES


def test_interfaces_agree_with_the_ledger(lab: NetnsHosts, tmp_path: Path) -> None:
    pooled = 4 * BATCH * TABLES * COLUMNS
    with ranks(lab, tmp_path) as processes:
        for variant, compression in (
            ("flat", 1),
            ("tower", 1),
            ("tower, compression 4", 4),
            ("flat, 16-bit messages", 2),
        ):
            row = measure(lab, processes, "dlrm", variant, link=0, repetitions=3)
            each_way = pooled * (HOSTS - 1) // HOSTS // compression  # spec: S (H-1)/H / CR
            ids = row["cross_host_bytes"] - 2 * each_way
            assert 0 < ids <= 4 * BATCH * TABLES, "ids are the only other payload that crosses"
            everything = row["cross_host_bytes"] * HOSTS * LOCAL
            assert everything < row["interface_bytes"] < 1.05 * everything
