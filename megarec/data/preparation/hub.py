"""What Hugging Face `datasets` opens, a local directory or a name on the hub, streamed: shard by shard, in batches.

A shard (mostly a file) is a unit of work. Data on the hub or in the directory are identified by the versions of their
files, so that a stopped preparation goes on only if they are the same.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from megarec.errors import UserError, did_you_mean

BATCH_ROWS = 1 << 14


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set.

    Attributes:
        name: a directory, or what the hub calls it.
        config: of several in one data set; None: the only one.
        split: its name there.
    """

    name: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{self.name}{'' if self.config is None else f'/{self.config}'}:{self.split}"

    @property
    def path(self) -> Path:
        """How messages call it."""
        return Path(str(self))

    @property
    def shards(self) -> int:
        """Parts that can be read by themselves."""
        with opened(self.name):
            return int(_stream(self).num_shards)

    @property
    def version(self) -> str:
        """Another one for other files."""
        with opened(self.name):
            return hashlib.sha256(repr(_files(self)).encode()).hexdigest()

    @property
    def size(self) -> int | None:
        """Bytes of its files; None: they are not on this machine."""
        try:
            return sum(Path(file).stat().st_size for file, _ in _files(self))
        except OSError:
            return None

    def names(self) -> list[str]:
        """Of its columns."""
        return next((batch.schema.names for batch in self.batches(0, None, lambda names: None)), [])

    def batches(
        self, shard: int, used: list[str] | None, check: Callable[[list[str]], None]
    ) -> Iterator[pa.RecordBatch]:
        """The rows of a shard, in order.

        Args:
            used: the columns to read; None: all.
            check: is given the names of all columns.

        Raises:
            UserError: it cannot be read.
        """
        with opened(str(self)):
            stream = _stream(self)
            shards = stream.num_shards
            if shards > 1:
                stream = stream.shard(num_shards=shards, index=shard)
            for number, table in enumerate(stream.with_format("arrow").iter(batch_size=BATCH_ROWS)):
                if number == 0:
                    check(table.column_names)
                for batch in table.select(used or table.column_names).combine_chunks().to_batches():
                    batch.validate(full=True)
                    yield batch

    def sample(self, rows: int) -> pa.RecordBatch:
        """The first rows, all columns."""
        found: list[pa.RecordBatch] = []
        for shard in range(self.shards):
            for batch in self.batches(shard, None, lambda names: None):
                found.append(batch)
                if sum(map(len, found)) >= rows:
                    break
            if sum(map(len, found)) >= rows:
                break
        if not found:
            raise UserError(f"{self}: no rows to infer from")
        with opened(str(self)):
            return pa.Table.from_batches(found).slice(0, rows).combine_chunks().to_batches()[0]


def splits_of(name: str, config: str | None) -> list[str]:
    """The splits of a data set.

    Raises:
        UserError: there is no such data set, or it cannot be opened.
    """
    with opened(name):
        return list(_saved(name)) if _is_saved(name) else [str(split) for split in _builder(name, config)]


def same_splits(name: str, config: str | None) -> dict[str, list[str]]:
    """The splits of a data set called train, valid (or validation, dev) and test, by their names here.

    Raises:
        UserError: one of them is not there.
    """
    known = splits_of(name, config)
    found = {}
    for split, names in (("train", ("train",)), ("valid", ("valid", "validation", "dev")), ("test", ("test",))):
        there = [called for called in names if called in known]
        if not there:
            raise UserError(
                f"{name} has no split {split!r}, only: {', '.join(known)}; choose them by --train, --valid and "
                "--test, or split one by --data SPLIT"
            )
        found[split] = there[:1]
    return found


def split_of(name: str, config: str | None, split: str, option: str) -> HubSplit:
    """A split by its name.

    Raises:
        UserError: there is none of that name; names those that there are.
    """
    known = splits_of(name, config)
    if split not in known:
        raise UserError(f"{option} {split}: {name} has no such split; {did_you_mean(split, known)}")
    return HubSplit(name, config, split)


@contextlib.contextmanager
def opened(named: str) -> Iterator[None]:
    """Inside, any error of `datasets` is a `UserError` that names the data set, and nothing else is printed."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # builders raise all kinds of errors
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(f"{named}: datasets cannot read it: {reason}") from error


def _is_saved(name: str) -> bool:
    """Whether `save_to_disk` wrote it."""
    return any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))


@functools.cache
def _saved(name: str) -> dict[str, Any]:
    import datasets

    found = datasets.load_from_disk(name)
    return {str(found.split or "train"): found} if isinstance(found, datasets.Dataset) else dict(found)


@functools.cache
def _builder(name: str, config: str | None) -> dict[Any, Any]:
    import datasets

    return dict(datasets.load_dataset(name, config, streaming=True))


@functools.cache
def _stream(split: HubSplit) -> Any:
    if not _is_saved(split.name):
        return _builder(split.name, split.config)[split.split]
    found = _saved(split.name)[split.split]
    return found.to_iterable_dataset(num_shards=max(1, min(len(found.cache_files), len(found))))


@functools.cache
def _files(split: HubSplit) -> tuple[tuple[str, str], ...]:
    """The files of a split, each with what says its version."""
    import datasets

    if _is_saved(split.name):
        files = [file["filename"] for file in _saved(split.name)[split.split].cache_files]
        return tuple((file, str(Path(file).stat().st_mtime_ns)) for file in files)
    data_files = datasets.load_dataset_builder(split.name, split.config).config.data_files or {}
    found = data_files.get(split.split)
    if found is None:
        return ((split.name, str(_stream(split).info.version)),)
    return tuple((str(file), str(version)) for file, version in zip(found, found.origin_metadata, strict=False))
