"""Users' own files -> a prepared data set, in several processes and bounded memory.

Three phases of tasks, each a pure function of its input: units of the files become pieces (scan.py), the values of
each table are merged into a vocabulary (merge.py), pieces become shards (encode.py). Tasks follow from the files and
the spec, never from the number of workers; a finished one is a file, so that a killed preparation goes on.
"""

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from megarec.data.preparation import table_reader
from megarec.data.preparation.encode import Encoder, shards_of
from megarec.data.preparation.fit import Numbers, Quantiles, cuts_of, mean_and_deviation, quantiles
from megarec.data.preparation.hub import HubSplit
from megarec.data.preparation.kept_spec import SPEC_FILE, Fitted, KeptSpec, Prepared, load_prepared
from megarec.data.preparation.merge import MergeTask, Table, merge, runs_of
from megarec.data.preparation.scan import Piece, Scanned, scan, scanned_file
from megarec.data.preparation.splits import ByColumn, ByTime, Division, Placing, Said, TimeCuts, time_runs
from megarec.data.preparation.table_reader import Unit, columns_of, units_of
from megarec.data.preparation.table_spec import (
    Bucketised,
    Categorical,
    Numeric,
    SplitColumn,
    TableSpec,
    load_table_spec,
)
from megarec.data.preparation.text_files import BadRow
from megarec.data.preparation.vocabulary import Hashing
from megarec.data.preparation.work import Progress, Workers, work_directory
from megarec.data.schema import SPLITS, Schema, save_schema
from megarec.data.writing import check_output, publish, writable
from megarec.errors import UserError
from megarec.ray_cluster import RayCluster

FORMAT = 5  # of pieces and look-ups: leftovers of another version are not used
Files = Mapping[str, list[Path] | list[HubSplit]]
"""By split, or "all", what is read."""
QUARANTINE_FILE = "quarantine.csv"
_KINDS = {"string": pa.string(), "integer": pa.int64(), "hexadecimal": pa.int64()}


@dataclass(frozen=True)
class MaxBad:
    """How many rows may be bad: a count, or a share of all."""

    count: int = 0
    share: float | None = None

    def check(self, bad: int, rows: int) -> bool:
        """Whether that many bad rows, out of all rows, are within it."""
        return bad <= self.count if self.share is None else bad <= self.share * rows


def prepare_table(
    spec_file: Path,
    files: Files,
    output: Path,
    *,
    workers: int | RayCluster = 1,
    max_bad: MaxBad = MaxBad(),
    shares: Division | None = None,
) -> Schema:
    """Write users' own files as a prepared data set; the bytes depend on the files and the spec alone.

    Args:
        spec_file: JSON of a TableSpec.
        files: the files of train, valid and test; with `shares` "all" is one.
        workers: processes; 1: this one. Or a Ray cluster whose nodes all see the files and the output's directory.
        max_bad: rows that may be bad; they are written to quarantine.csv.
        shares: how the rows of files["all"] are split.

    Raises:
        UserError: names the file, and the key or the row and column, with the value seen and what was expected.
    """
    return prepare_spec(load_table_spec(spec_file), spec_file, files, output, None, workers, max_bad, shares)


def prepare_as(
    like: Path,
    files: Files,
    output: Path,
    *,
    workers: int | RayCluster = 1,
    max_bad: MaxBad = MaxBad(),
    shares: Division | None = None,
) -> Schema:
    """Write more files as a data set that was prepared before: by its spec and vocabularies, nothing is counted.

    Args:
        like: that data set.
        files: as of `prepare_table`; one split is enough, and no file needs a label.

    Raises:
        UserError: as `prepare_table`, or `like` does not keep its spec.
    """
    found = load_prepared(like)
    return prepare_spec(found.kept.spec, like / SPEC_FILE, files, output, found, workers, max_bad, shares)


def prepare_spec(
    spec: TableSpec,
    named: Path | str,
    files: Files,
    output: Path,
    like: Prepared | None,
    workers: int | RayCluster,
    max_bad: MaxBad,
    shares: Division | None = None,
) -> Schema:
    """`prepare_table` or `prepare_as` for a spec in memory; `named` is its name in messages."""
    check_output(output)
    whole = spec
    paths = [(split, path) for split in (*SPLITS, "all") for path in files.get(split, ())]
    wanted = "time" if isinstance(shares, ByTime) else "split" if isinstance(shares, ByColumn) else None
    if wanted is not None and spec.role(wanted) is None:
        how = "time" if wanted == "time" else "column"
        raise UserError(f"--split {how}: {named} names no column of type {wanted!r}; add one, or take --split random")
    if like is not None:
        there = {name for _, path in paths for name in columns_of(path, spec)}
        absent = {name for name in spec.roles if name not in there and spec.columns[name].type != wanted}
        spec = spec.without(absent if set(spec.labels) <= absent else absent - set(spec.labels))
    if wanted != "split":
        spec = spec.ignoring(set(spec.of_type("split")))
    units = [unit for split, path in paths for unit in units_of(path, split, spec)]
    plan = _plan(spec, units, like, shares)
    if output.is_symlink():
        output = output.resolve()
    if isinstance(workers, int) and sum(unit.size for unit in units) < table_reader.UNIT_BYTES:
        workers = 1  # starting others would take longer
    with writable(output), work_directory(output, plan) as work, _engine(workers, work) as pool:
        for name in ("times", "pieces", "tables", "done", "data"):
            (work / name).mkdir(exist_ok=True)
        schema = _Preparation(whole, spec, spec.features, files, units, work, pool, max_bad, shares).run(like)
        publish(work / "data", output)
    return schema


def _engine(workers: int | RayCluster, work: Path) -> Workers | RayCluster:
    return Workers(workers) if isinstance(workers, int) else workers.sharing(work)


@dataclass
class _Preparation:
    """What the phases of a preparation share.

    Attributes:
        whole: the spec that the data set keeps.
        read: of the columns that are read.
        spec: of the features that they become.
    """

    whole: TableSpec
    read: TableSpec
    spec: TableSpec
    files: Files
    units: list[Unit]
    work: Path
    pool: Workers | RayCluster
    max_bad: MaxBad
    shares: Division | None

    def run(self, like: Prepared | None) -> Schema:
        """Carry out what is not done yet; everything then lies below work/data."""
        self._progress = Progress()
        pieces = self._scan()
        rows = {split: sum(piece.rows for piece in pieces[split]) for split in self.splits}
        for split, count in rows.items():
            if count == 0:
                named = ", ".join(map(str, self.files[split if self.shares is None else "all"]))
                raise UserError(f"{named}: no rows; every split needs some{self._why_none(split)}")
        tables = self._merge(pieces, like)
        kept = KeptSpec(spec=self.whole, fitted=self._fit(pieces["train"])) if like is None else like.kept
        known = self._encode(pieces, tables, kept.fitted)
        self._progress.end()
        present = {split: sum((Counter(p.present) for p in pieces[split]), Counter[str]()) for split in rows}
        unknown = {
            split: {
                name: round((present[split][name] - known[split][name]) / max(present[split][name], 1), 6)
                for name in self.spec.ids
                if self._owner(name).hash is None
            }
            for split in rows
        }
        missing = {
            split: {
                name: round(1 - present[split][name] / rows[split], 6)
                for name, column in self.spec.columns.items()
                if isinstance(column, Categorical | Bucketised | Numeric)
            }
            for split in rows
        }
        means = {name: present["train"][name] / rows["train"] for name in self.spec.ids} if "train" in rows else {}
        if like is not None:
            means |= {feature.name: feature.mean_length for feature in like.schema.categorical}
        schema = kept.data_schema(self.spec, tables, rows, means)
        shared = {
            name: round(tables[name].shared / max(tables[name].values, 1), 6)  # type: ignore[operator]
            for name in tables
            if tables[name].shared is not None
        }
        counted = {"unknown": unknown, "missing": missing, "sharing": shared, "bad_rows": dict(self._reasons)}
        schema = schema.model_copy(update=counted)
        kept.save(self.work / "data")
        save_schema(schema, self.work / "data")
        return schema

    @property
    def splits(self) -> list[str]:
        return [split for split in SPLITS if split in self.files or self.shares is not None]

    def _why_none(self, split: str) -> str:
        if isinstance(self.shares, ByTime):
            return f" and {split} got none: too few times differ"
        if isinstance(self.shares, ByColumn):
            return f" and {split} got none: {self.spec.role('split')!r} never names it"
        return "" if self.shares is None else f" and {split} got none by chance"

    def _placing(self) -> Placing | None:
        """How rows find their splits; of a split by time the first pass says it."""
        if isinstance(self.shares, ByColumn):
            (name,) = self.spec.of_type("split")
            column = self.spec.columns[name]
            assert isinstance(column, SplitColumn)
            return Said(name, column)
        if not isinstance(self.shares, ByTime):
            return self.shares
        self._progress.begin("reading times", sum(unit.size for unit in self.units))
        (name,) = self.spec.of_type("time")
        runs: list[tuple[Path, str]] = []
        task = partial(time_runs, self.read, self.work / "times")
        for (_, unit), paths in self.pool.run(task, enumerate(self.units)):
            runs += [(path, name) for path in paths]
            self._progress.add(unit.size)
        return TimeCuts(name, cuts_of(Numbers(name, tuple(runs)), self.shares.fractions))

    def _table(self, name: str) -> str:
        """The feature whose table a feature uses."""
        return self.spec.ids[name].table or name

    def _owner(self, name: str) -> Any:
        return self.spec.ids[self._table(name)]

    def _scan(self) -> dict[str, list[Piece]]:
        pieces: dict[str, list[Piece]] = {split: [] for split in SPLITS}
        placing = self._placing()
        self._progress.begin("reading", sum(unit.size for unit in self.units), later=0.8)
        most = self.max_bad.count if self.max_bad.share is None else None
        self._rows: list[int] = []  # of each unit, bad ones included
        self._reasons = Counter[str]()
        first: tuple[int, BadRow] | None = None
        task = partial(scan, self.read, self.work / "pieces", most, placing)
        for (number, unit), found in self.pool.run(task, enumerate(self.units)):
            self._rows.append(found.rows)
            self._reasons.update(bad.reason for bad in found.bad)
            if found.bad and first is None:
                first = number, min(found.bad)
            if most is not None and self._reasons.total() > most:
                self._refuse(first)
            for piece in found.pieces:
                pieces[piece.split].append(piece)
            self._progress.add(unit.size, found.rows)
        if not self.max_bad.check(self._reasons.total(), sum(self._rows)):
            self._refuse(first)
        if self._reasons:
            self._quarantine()
        return pieces

    def _before(self, number: int) -> int:
        """Rows of the file that come before a unit."""
        unit = self.units[number]
        earlier = (i for i in range(number) if (self.units[i].path, self.units[i].split) == (unit.path, unit.split))
        return sum(self._rows[i] for i in earlier)

    def _refuse(self, first: tuple[int, BadRow] | None) -> None:
        assert first is not None
        number, bad = first
        unit = self.units[number]
        line = f"{unit.path}: row {self._before(number) + bad.row} ({unit.counted}): {bad.what}"
        if self.max_bad == MaxBad():
            raise UserError(line)
        most = self.max_bad.count if self.max_bad.share is None else f"{self.max_bad.share:.6g}"
        reasons = ", ".join(f"{count:,} for {reason}" for reason, count in sorted(self._reasons.items()))
        raise UserError(
            f"{self._reasons.total():,} of {sum(self._rows):,} rows read are bad ({reasons}), "
            f"more than --max-bad {most} allows; the first: {line}"
        )

    def _quarantine(self) -> None:
        """Write the bad rows for people: file, row, reason, what was seen."""
        with (self.work / "data" / QUARANTINE_FILE).open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(["file", "row", "reason", "found"])
            for number, unit in enumerate(self.units):
                found = Scanned.load(scanned_file(self.work / "pieces", number))
                before = self._before(number)
                for bad in found.bad if found is not None else ():
                    lines.writerow([unit.path, before + bad.row, bad.reason, bad.what])

    def _merge(self, pieces: dict[str, list[Piece]], like: Prepared | None) -> dict[str, Table]:
        owners = [name for name, column in self.spec.ids.items() if column.table is None]
        tasks = []
        for number, name in enumerate(owners):
            column = self.spec.ids[name]
            hashing = None if column.hash is None else Hashing(column.hash)
            some = [piece for split in SPLITS for piece in pieces[split]] if hashing else pieces["train"]
            features = [n for n in self.spec.ids if self._table(n) == name] if hashing else [name]
            runs = runs_of(some, self.work / "pieces", features)
            given = None if hashing or like is None else like.directory
            tasks.append(MergeTask(number, name, _KINDS[column.dtype], runs, column.min_count, hashing, given))
        self._progress.begin("counting", len(tasks), later=2.0)
        found = {}
        for task, table in self.pool.run(partial(merge, self.work / "tables", self.work / "data"), tasks):
            found[task.name] = table
            self._progress.add(1)
        return found

    def _fit(self, train: list[Piece]) -> Fitted:
        """What the training split decides of numbers."""
        columns = {n: column for n, column in self.spec.columns.items() if isinstance(column, Bucketised)}
        found = {name: column.boundaries or [] for name, column in columns.items()}
        cuts = [
            Quantiles(Numbers(name, runs_of(train, self.work / "pieces", [name])), column.buckets)
            for name, column in columns.items()
            if column.buckets is not None
        ]
        found |= {task.numbers.name: boundaries for task, boundaries in self.pool.run(quantiles, cuts)}
        return Fitted(
            boundaries=found, moments={name: mean_and_deviation(train, name) for name in self.spec.standardised}
        )

    def _encode(
        self, pieces: dict[str, list[Piece]], tables: dict[str, Table], fitted: Fitted
    ) -> dict[str, Counter[str]]:
        number_of = {name: number for number, name in enumerate(tables)}
        encoder = Encoder(
            self.spec,
            self.work / "pieces",
            self.work / "tables",
            {name: number_of[self._table(name)] for name in self.spec.ids},
            fitted,
            self.work / "data",
            self.work / "done",
        )
        shards = [shard for split in self.splits for shard in shards_of(split, pieces[split])]
        self._progress.begin("writing", sum(shard.rows for shard in shards))
        known = {split: Counter[str]() for split in self.splits}
        for shard, found in self.pool.run(encoder, shards):
            known[shard.split].update(found)
            self._progress.add(shard.rows, shard.rows)
        return known


def _plan(spec: TableSpec, units: list[Unit], like: Prepared | None, shares: Division | None) -> dict[str, Any]:
    """What decides every byte that is written."""
    files = {unit.path: unit.path.stat() for unit in units if unit.source is None}
    sources = {unit.path: unit.source.version for unit in units if unit.source is not None}
    return {
        "format": FORMAT,
        "pyarrow": pa.__version__,
        "spec": spec.model_dump(),
        "shares": repr(shares),
        "files": [[str(path.resolve()), status.st_size, status.st_mtime_ns] for path, status in files.items()],
        "units": [[str(unit.path), unit.split, unit.span, unit.groups, unit.shard] for unit in units],
        "sources": {str(path): version for path, version in sources.items()},
        "like": None if like is None else like.schema.identity,
    }
