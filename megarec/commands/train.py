"""One run, started by the deepspeed launcher, by torchrun, or as it is on one rank.

From a checkout launch/train.py; from an installed package:

deepspeed --num_gpus 2 --module megarec.train --config run.json
torchrun --nproc_per_node 2 -m megarec.train --config run.json --set train.epochs=1
megarec train --config run.json --resume
megarec train --config run.json --print-config
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

STARTED = time.time()  # before the imports that take seconds

from megarec.config.load import load_config  # noqa: E402
from megarec.config.models import SCALED_SIZES, WukongConfig  # noqa: E402
from megarec.config.sections import RunConfig  # noqa: E402
from megarec.errors import ArgumentParser, UserError, exits_cleanly  # noqa: E402
from megarec.launching.exit_report import end_well, end_with_mistake, reported  # noqa: E402
from megarec.launching.orphans import end_without_launcher  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description="Train one model from one JSON.")
    parser.add_argument("--config", type=Path, required=True, help="the run's JSON")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key")
    parser.add_argument("--resume", action="store_true", help="continue from the latest checkpoint, if there is one")
    parser.add_argument("--print-config", action="store_true", help="print the resolved run and stop")
    parser.add_argument("--local_rank", type=int, default=0, help="passed by the deepspeed launcher; not used")
    return parser.parse_args()


@exits_cleanly
def main() -> None:
    arguments = parse_arguments()
    try:
        with reported():
            config = load_config(arguments.config, arguments.set)
        if arguments.print_config:
            print_resolved(config)
            return
        with reported():
            end_without_launcher()
            from megarec.distributed.process import leave_job
            from megarec.planning.hardware import load_hardware
            from megarec.planning.monitored import monitored_points
            from megarec.training.trainer import train  # imported late: seconds that --print-config and a mistake save

            given = config.train.hardware
            machine = None if given is None else load_hardware(given, "train.hardware")
            train(config, arguments.resume, STARTED, partial(monitored_points, machine=machine))
            leave_job()
            if "RANK" in os.environ:
                end_well()
    except UserError as error:
        if "RANK" in os.environ:
            end_with_mistake(error)
        raise


def print_resolved(config: RunConfig) -> None:
    """The run as it will train, on standard output; why model.scale gives these sizes, on standard error."""
    unknown = {}
    if isinstance(config.model, WukongConfig) and config.model.scale is not None:
        from megarec.data.schema import schema_of
        from megarec.run.spec import resolve

        try:
            schema = schema_of(config.data)
        except UserError as error:
            unknown = {"model": set(SCALED_SIZES)}
            reasons: tuple[str, ...] = (f"sizes that model.scale derives are left out: {error}",)
        else:
            spec = resolve(config, schema)
            config, reasons = config.model_copy(update={"model": spec.sizes}), spec.reasons
        print(*reasons, sep="\n", file=sys.stderr)
    print(config.model_dump_json(indent=2, exclude=unknown))


if __name__ == "__main__":
    main()
