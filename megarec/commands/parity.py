"""One model, any topology, the same numbers: train the same steps under many topologies, compare with one process."""

import json
import sys

from megarec.errors import ArgumentParser, exits_cleanly
from megarec.parity.cases import cases
from megarec.parity.run import Result, run_matrix


@exits_cleanly
def main() -> None:
    parser = ArgumentParser(description="Compare loss curves under many topologies with one process.")
    parser.add_argument("--matrix", choices=("small", "full"), default="small")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()

    def report(result: Result) -> None:
        if not arguments.json:
            mark = "ok  " if result.passed else "FAIL"
            print(f"{mark} {result.relative_deviation:.2e} (limit {result.tolerance:.0e})  {result.name}", flush=True)

    results = run_matrix(cases(arguments.matrix), report)
    exact = [result.relative_deviation for result in results if result.tolerance <= 1e-5]
    if arguments.json:
        listed = [
            {"name": r.name, "relative_deviation": r.relative_deviation, "tolerance": r.tolerance} for r in results
        ]
        print(json.dumps({"max_relative_deviation": max(exact), "cases": listed}))
    else:
        print(f"{len(results)} cases, largest relative deviation in fp32: {max(exact):.2e}")
    sys.exit(0 if all(result.passed for result in results) else 1)


if __name__ == "__main__":
    main()
