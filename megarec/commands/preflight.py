"""Checks every host of a hostfile before a run is started on them: one line a failure, with its remedy."""

import json
import sys
from dataclasses import asdict

from megarec.errors import USER_MISTAKE, ArgumentParser, exits_cleanly
from megarec.launching.cli import add_host_arguments, add_run_arguments, job_of
from megarec.launching.preflight import check_hosts, table


@exits_cleanly
def main() -> None:
    parser = ArgumentParser(description="Check the hosts of a hostfile before a run.")
    add_host_arguments(parser)
    add_run_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    job, _ = job_of(arguments)
    report = check_hosts(job)
    if arguments.json:
        print(json.dumps({"ok": not report.failures, "failures": [asdict(f) for f in report.failures]}))
    elif not report.failures:
        print(*table(job, report), sep="\n")
    for failure in report.failures:
        print(f"error: {failure}", file=sys.stderr)
    sys.exit(USER_MISTAKE if report.failures else 0)


if __name__ == "__main__":
    main()
