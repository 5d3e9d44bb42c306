"""How long training waits for ids, with and without sending them while the step before computes.

    python tools/bench.py overlap      # as root: needs network namespaces

Two hosts of two single-thread ranks over links of 1 Gbit/s, tower exchange, DLRM, 26 tables x 20,000 x 64, batch 2,048
a rank; every other feature is a list of 0 to 20 ids; the times are those of each rank's own profiler trace.
"""

import tempfile
from pathlib import Path
from typing import Any

from tools.benchmarks.testbed import NetnsHosts
from tools.benchmarks.towers import HOSTS, LOCAL, ask, ranks

GBIT, STEPS, ROUNDS = 1.0, 8, 2


def run() -> dict[str, Any]:
    """Milliseconds a step by switch, in turns, and the share of the waiting that overlap takes away.

    Raises:
        UserError: this machine cannot make hosts of namespaces.
    """
    found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    with (
        tempfile.TemporaryDirectory() as directory,
        NetnsHosts(Path(directory), hosts=HOSTS, slots=LOCAL, mbit=1000 * GBIT) as lab,
        ranks(lab, Path(directory)) as processes,
    ):
        for _ in range(ROUNDS):
            for overlap in found:
                found[overlap] += ask(processes, {"overlap": overlap, "steps": STEPS})
    rows = [
        {"overlap": overlap, "link_gbit": GBIT}
        | {key: sum(answer[key] for answer in answers) / len(answers) for key in ("exposed_ms", "step_ms")}
        for overlap, answers in found.items()
    ]
    without, with_ = rows
    return {
        "name": "overlap",
        "rows": rows,
        "ratios": {
            "exposed_taken_away": 1 - with_["exposed_ms"] / without["exposed_ms"],
            "step_over_no_overlap": with_["step_ms"] / without["step_ms"],
        },
    }
