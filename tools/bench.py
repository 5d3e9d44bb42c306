"""One benchmark side by side with its reference, in one run.

python tools/bench.py tables          # the sparse side over bare FBGEMM
python tools/bench.py regularisation  # L2 on all rows of a table of a million rows, over plain torch
python tools/bench.py flat --json     # the flat exchange over TorchRec's (bash tools/bench_env.sh first)
python tools/bench.py dense           # the dense model against the machine's GEMM peak
python tools/bench.py tensor          # tensor parallelism against data parallelism on two ranks
python tools/bench.py recompute       # what activation checkpointing saves and costs
python tools/bench.py towers           # flat and tower exchange over shaped links, and TorchRec's (as root)
python tools/bench.py plan             # the planner's steps beside those that towers measured
python tools/bench.py planner          # the planner's steps beside measured systems of MLPerf Training
python tools/bench.py placements       # the planner's pick of 40 placements of tables beside their cost on two ranks
python tools/bench.py checkpoint       # saving and loading over plain writes and reads; steps beside a save
python tools/bench.py overlap          # waiting for ids, with and without overlap (as root)
python tools/bench.py prepare          # files of Criteo's format, made up, at two sizes: rows/s and memory
python tools/bench.py groups           # does the partitioner find the hidden groups of made-up data
python tools/bench.py loader           # the loader's examples a second over bare takes of Arrow
python tools/bench.py serving          # one raw row from an export, and over HTTP, beside eager torch
python tools/bench.py tasks            # one MMoE of two labels beside two models of one, made-up data
python tools/bench.py evaluation       # GAUC, NDCG and bootstrap of ten million rows, beside scikit-learn
python tools/bench.py sequences        # lists row by row, as sequences want them, beside the pooled exchange
"""

import difflib
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.errors import ArgumentParser, UserError, exits_cleanly

NAMES = (
    "tables",
    "regularisation",
    "flat",
    "dense",
    "tensor",
    "recompute",
    "towers",
    "overlap",
    "checkpoint",
    "groups",
    "plan",
    "placements",
    "planner",
    "loader",
    "prepare",
    "serving",
    "evaluation",
    "sequences",
    "tasks",
)


@exits_cleanly
def main() -> None:
    parser = ArgumentParser(description="Run one benchmark side by side with its reference.")
    parser.add_argument("name", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="towers only: a picture as well, .png or .svg")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="plan: what `towers --json` printed; planner: a CSV of systems"
    )
    arguments = parser.parse_args()
    if arguments.name not in NAMES:
        near = difflib.get_close_matches(arguments.name, NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"benchmarks: {', '.join(NAMES)}"
        raise UserError(f"no benchmark is called {arguments.name!r}; {hint}")
    if arguments.plot and arguments.name != "towers":
        raise UserError(f"--plot {arguments.plot}: there is a picture of the benchmark 'towers' only")
    if arguments.results and arguments.name not in ("plan", "planner"):
        raise UserError(f"--results {arguments.results}: only 'plan' and 'planner' read results")
    given = [arguments.results] if arguments.results else []
    result = importlib.import_module(f"tools.benchmarks.{arguments.name}").run(*given)
    if arguments.plot:
        from tools.benchmarks.towers_plot import plot  # matplotlib takes a second to import

        plot(result["rows"], arguments.plot)
    if arguments.json:
        print(json.dumps(result))
        return
    for row in (*result["rows"], *result.get("anchors", [])):
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    for key, value in result["ratios"].items():
        aim = result.get("aims", {}).get(key)
        print(f"{key} {value:.3f}" + (f" (aim: {aim})" if aim else ""))


if __name__ == "__main__":
    main()
