"""An export over HTTP: raw rows in, probabilities out."""

import argparse
from collections.abc import Callable
from pathlib import Path

from megarec.errors import ArgumentParser, UserError, exits_cleanly

LOCALHOST = "127.0.0.1"


@exits_cleanly
def main() -> None:
    parser = ArgumentParser(description="Serve an export (checkpoint export RUN DIR --format onnx) over HTTP.")
    parser.add_argument("export", type=Path, help="the export's directory")
    parser.add_argument("--host", default=LOCALHOST, help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=_within(0, 65_535), default=8000, help="default: 8000; 0: a free one")
    parser.add_argument("--threads", type=_within(1, 1024), default=1, help="threads of the dense model (default: 1)")
    parser.add_argument(
        "--max-rows", type=_within(1, 1 << 20), default=1024, help="most rows of a request (default: 1024)"
    )
    parser.add_argument(
        "--max-body",
        type=_within(1, 1 << 31),
        default=1 << 20,
        metavar="BYTES",
        help="most bytes of a request (default: 1 MiB)",
    )
    arguments = parser.parse_args()
    try:
        from megarec.serving.scorer import Scorer, ScoringError
        from megarec.serving.server import Limits, serve
    except ImportError as error:
        raise UserError(
            f"serving needs the packages of the extra 'serve' ({error}): pip install 'megarec[serve]'"
        ) from error
    try:
        scorer = Scorer(arguments.export, arguments.threads)
        serve(scorer, arguments.host, arguments.port, Limits(arguments.max_body, arguments.max_rows))
    except ScoringError as error:
        raise UserError(error) from error


def _within(low: int, high: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r}, expected {low} to {high}")
        return int(text)

    return number


if __name__ == "__main__":
    main()
