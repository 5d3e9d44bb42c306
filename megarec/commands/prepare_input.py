"""The input of prepare_data.py's command line: files, splits of a data set, how rows are split."""

import argparse
import re
from pathlib import Path

from megarec.data.preparation import hub
from megarec.data.preparation.splits import ByColumn, ByTime, Division, Shares
from megarec.data.sources.synthetic import check_size
from megarec.errors import UserError


def hub_splits(args: argparse.Namespace, split: str, names: list[str]) -> list[hub.HubSplit]:
    """Splits of a data set that `datasets` opens.

    Raises:
        UserError: no split has that name, or one is named twice.
    """
    option = "--data" if split == "all" else f"--{split}"
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{option} names {name} twice: its rows would count twice; name it once")
    return [hub.split_of(args.dataset, args.config, name, option) for name in names]


def division_of(args: argparse.Namespace, given: list[str]) -> Division | None:
    """How the rows of --data are split; None: without --data.

    Raises:
        UserError: options that do not go together, or fractions that do not add up to 1.
    """
    if args.data is None:
        for option in ("split", "fractions", "seed"):
            if getattr(args, option) is not None:
                raise UserError(f"--{option} says how to split --data; name its files")
        return None
    if given:
        raise UserError(f"--data is split, --{given[0]} is one split already; keep one of them")
    for option, ways in (("seed", ("random", None)), ("fractions", ("random", "time", None))):
        if getattr(args, option) is not None and args.split not in ways:
            raise UserError(f"--split {args.split} takes no --{option}; leave it out")
    if args.split == "column":
        return ByColumn()
    train, valid, test = args.fractions or (0.8, 0.1, 0.1)
    if not all(0 < share < 1 for share in (train, valid, test)) or abs(train + valid + test - 1) > 1e-6:
        raise UserError(f"--fractions {train} {valid} {test}: expected three shares above 0 that add up to 1")
    if args.split == "time":
        return ByTime((train, valid, test))
    seed = 1 if args.seed is None else args.seed
    check_size("seed", seed, 0, (1 << 31) - 1)
    return Shares((train, valid, test), seed)


def listed(paths: list[Path]) -> list[Path]:
    """Files; those of a directory and of a pattern, day_2 before day_10.

    Raises:
        UserError: a directory or pattern without a file.
    """
    found = []
    for path in paths:
        if path.is_dir():
            some = [inside for inside in path.iterdir() if inside.is_file() and not inside.name.startswith((".", "_"))]
        elif any(sign in path.name for sign in "*?[") and not path.exists():
            some = [match for match in path.parent.glob(path.name) if match.is_file()]
        else:
            found.append(path)
            continue
        if not some:
            raise UserError(f"{path}: no file is there")
        found += sorted(
            some, key=lambda file: [(len(n), n) if n.isdecimal() else n for n in re.split(r"(\d+)", file.name)]
        )
    return found


def check_files(files: dict[str, list[Path]]) -> None:
    """Refuse a file that is twice in a split."""
    for split, paths in files.items():
        seen = set()
        for path in paths:
            if (real := path.resolve()) in seen:
                raise UserError(f"--{split} names {path} twice ({real}): its rows would count twice; name it once")
            seen.add(real)
