"""The content of a run's checkpoint, and how it is loaded."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarec.checkpoint import compatibility, settings, sparse
from megarec.checkpoint.format import DTYPES, Index
from megarec.checkpoint.offline import AVERAGES
from megarec.checkpoint.reading import Reader
from megarec.checkpoint.sparse import TABLES, TOWERS
from megarec.dense.masters import DENSE as DENSE
from megarec.errors import DamagedCheckpoint, UserError
from megarec.run.build import Run
from megarec.run.metrics import Predictions
from megarec.run.state import TrainState
from megarec.slices import Ints, TensorSlice

WINDOW = "metrics/window"
RANDOM = "random/"
MISSING = -1e30  # in place of a label; no logit


def written(run: Run, window: Predictions | None) -> list[TensorSlice]:
    """What this rank writes; over all ranks every element of every tensor once."""
    layout, topology = run.spec.layout, run.topology
    run.sparse.settle()
    pieces = run.dense.written() + sparse.tables_written(run.sparse, layout, topology)
    if run.sparse.modules is not None:
        pieces += sparse.towers_written(run.sparse.modules, topology, run.config.parallel.exchange)
    pieces += _averages(run, pieces, to_write=True)
    pieces += [_row_of_rank(run, RANDOM + name, state) for name, state in _random_states(run.device).items()]
    if window is not None and window.logits:
        shown = _without_nan(window.packed())
        examples = shown.shape[1]
        whole, start = (len(shown), examples * topology.world_size), (0, examples * topology.rank)
        pieces.append(TensorSlice(WINDOW, whole, start, shown))
    return [piece for piece in pieces if piece.tensor.numel()]


def _averages(run: Run, weights: list[TensorSlice], *, to_write: bool) -> list[TensorSlice]:
    """Slices of averaged weights, named as the weights, with the prefix AVERAGES.

    Args:
        weights: slices of tables and tower modules, among others.
    """
    averages = run.averages
    if not averages:
        return []
    tensors = {TABLES + name: tensor for name, tensor in averages.tables.items()}
    tensors |= {TOWERS + name: tensor for name, tensor in averages.modules.items()}
    pieces = run.dense.laid_out(averages.of_master, to_write=to_write)
    pieces += [replace(piece, tensor=tensors[piece.name]) for piece in weights if piece.name in tensors]
    return [replace(piece, name=AVERAGES + piece.name) for piece in pieces]


def _averages_held(run: Run) -> list[TensorSlice]:
    weights = sparse.tables_held(run.sparse, run.spec.layout)
    if run.sparse.modules is not None:
        weights += sparse.towers_held(run.sparse.modules)
    return _averages(run, weights, to_write=False)


def about(run: Run, position: TrainState) -> dict[str, Any]:
    """index.json without step, tensors, files and what `sealed` adds."""
    config, topology = run.config, run.topology
    return {
        "format": "megarec checkpoint",
        "position": position.to_json(),
        "topology": {
            "ranks": topology.world_size,
            "ranks_per_host": topology.ranks_per_host,
            "tensor": topology.tensor_size,
            "zero": run.dense.zero_stage,
            "exchange": config.parallel.exchange,
            "placement": config.embedding.placement,
        },
        "config": config.model_dump(mode="json"),
        "schema": run.schema.model_dump(mode="json"),
        "towers": compatibility.towers_of(run),
        "optimizer": run.dense.optimizer_name,
        "tower_optimizer": None if run.sparse.modules is None else run.sparse.modules.settings.optimizer,
        "loss_scale": run.dense.loss_scaler_state(),
    }


def check(run: Run, directory: Path, index: Index, position: TrainState) -> None:
    """Raise a UserError that names what does not fit this run."""
    _check_best(run, directory, position)
    config = run.config.model_dump(mode="json")
    compatibility.check_schema(directory, index, run.schema.model_dump(mode="json"))
    compatibility.check_optimizer(directory, index, run.dense.optimizer_name)
    compatibility.check_tower_modules(run, directory, index)
    _check_names(run, directory, index)
    parameters = {DENSE + name: shape for name, shape in run.dense.shapes()}
    expected = parameters | _expected_states(index, parameters, position) | dict(run.dense.statistics_shapes())
    compatibility.check_tensors(directory, index, expected, (DENSE,), config)
    for piece in _averages_held(run):
        there = index.tensors.get(piece.name)
        if there is not None and there.shape != piece.shape:
            raise UserError(f"{directory}: {piece.name} is {list(there.shape)} there, {list(piece.shape)} in this run")
    layout = run.spec.layout
    mine = {piece.name: piece for piece in sparse.tables_held(run.sparse, layout)}
    tables: dict[str, Ints] = {f"{TABLES}{table.name}/weight": (table.rows, table.columns) for table in layout.tables}
    tables |= {name: piece.shape for name, piece in mine.items()}
    own = tuple({name.rpartition("/")[0] + "/" for name in mine})
    compatibility.check_tensors(directory, index, tables, own, config)
    for name, piece in mine.items():
        if DTYPES[index.tensors[name].dtype] != piece.tensor.dtype:
            raise UserError(
                f"{directory}: {name} is {index.tensors[name].dtype} there, {piece.tensor.dtype} in this run; resume "
                "with the embedding.weights it was written with"
            )
    settings.check_model(directory, index, run.config)


def _check_names(run: Run, directory: Path, index: Index) -> None:
    """Every tensor is of a kind that checkpoints have, and of this run's tables; torch's random state is there."""
    tables = {TABLES + table.name for table in run.spec.layout.tables}
    for name in index.tensors:
        of_table = name.startswith(TABLES)
        if not (of_table or name == WINDOW or name.startswith((DENSE, TOWERS, RANDOM, AVERAGES))):
            raise DamagedCheckpoint(f"{directory}: {name} is there, but no run has it")
        if of_table and name.rpartition("/")[0] not in tables:
            raise UserError(f"{directory}: {name} is there, but this run has no such table; resume with its config")
    if RANDOM + "cpu" not in index.tensors:
        raise DamagedCheckpoint(f"{directory}: {RANDOM}cpu, the state of torch's generator, is not there")


def _expected_states(index: Index, parameters: Mapping[str, Ints], position: TrainState) -> dict[str, Ints]:
    """Shapes of the dense optimizer's states: what one parameter has, all of them have.

    Before its first step an optimizer has none; after it, Adam has its two moments.
    """
    numbers: dict[str, bool] = {}
    for name, entry in index.tensors.items():
        parameter, _, what = name.rpartition("/")
        if parameter in parameters:
            numbers.setdefault(what, not entry.shape)
    if compatibility.is_adam(index.optimizer) and position.step > position.skipped_steps:
        numbers = {"exp_avg": False, "exp_avg_sq": False} | numbers
    return {
        f"{name}/{what}": () if number else shape
        for name, shape in parameters.items()
        for what, number in numbers.items()
    }


def _check_best(run: Run, directory: Path, position: TrainState) -> None:
    """A best model by another metric cannot be compared: no validation would beat it."""
    wish = run.config.train.best_by
    if position.best_by not in (None, wish):
        raise UserError(
            f"{directory}: its best model was chosen by train.best_by={position.best_by}, this run asks for {wish}; "
            f"resume with train.best_by={position.best_by}, or start from scratch without --resume"
        )


@torch.no_grad()
def fill(run: Run, reader: Reader, window: Predictions | None) -> None:
    """Copy this rank's slices out of a checkpoint that `check` has found to fit."""
    index, random = reader.index, _random_states_there(run, reader)
    try:
        run.dense.allocate_states(_dense_states(reader))
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{reader.directory}: {error}") from error
    run.sparse.settle()  # else pending decay would be applied to the checkpoint's weights
    for piece in run.dense.held() + sparse.tables_held(run.sparse, run.spec.layout):
        reader.fill(piece)
    compatibility.fill_tower_modules(run, reader)
    run.averages.start()
    for piece in _averages_held(run):
        if piece.name in index.tensors:  # else this run is the first one that averages it
            reader.fill(piece)
    for name, state in random.items():
        _set_random_state(name, state)
    if window is not None and WINDOW in index.tensors:
        _fill_window(run, reader, window)


def finish(run: Run, index: Index, step: int, skipped: int) -> None:
    """What follows from the weights and numbers that `fill` has copied; collective."""
    run.dense.resume(step, skipped, step * run.config.data.batch_size, index.loss_scale)


def remarks(run: Run, index: Index) -> Iterator[str]:
    """Log lines for a load."""
    if run.sparse.modules is None or not run.config.train.reset_towers:
        return
    if compatibility.resets_towers(run, index):
        yield (
            "train.reset_towers=true: tables and dense model are the checkpoint's, tower modules start from scratch, "
            "and so does the search for the best model"
        )
    else:
        yield "train.reset_towers=true has nothing to do: the checkpoint's tower modules fit, and are kept"


def _dense_states(reader: Reader) -> dict[str, dict[str, Any]]:
    """By parameter and state of the optimizer: a number, or None for a whole tensor."""
    states: dict[str, dict[str, Any]] = {}
    for name, entry in reader.index.tensors.items():
        parameter, slash, what = name.removeprefix(DENSE).partition("/")
        if name.startswith(DENSE) and slash:
            number = None
            if not entry.shape:
                room = torch.empty((), dtype=DTYPES[entry.dtype])
                reader.fill(TensorSlice(name, (), (), room))
                number = room.item()
            states.setdefault(parameter, {})[what] = number
    return states


def _row_of_rank(run: Run, name: str, state: Tensor) -> TensorSlice:
    """A row of a [ranks, n] tensor, this rank's."""
    return TensorSlice(name, (run.topology.world_size, state.numel()), (run.topology.rank, 0), state.view(1, -1))


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """torch's generators; data order, first weights and dropout masks depend on none of them."""
    states = {"cpu": torch.get_rng_state()}
    return states if device.type != "cuda" else states | {"cuda": torch.cuda.get_rng_state(device)}


def _random_states_there(run: Run, reader: Reader) -> dict[str, Tensor]:
    """This rank's in the checkpoint, if as many ranks wrote it.

    Raises:
        DamagedCheckpoint: one is not the state of a generator.
    """
    found = {}
    for name, state in _random_states(run.device).items():
        piece = _row_of_rank(run, RANDOM + name, state)
        there = reader.index.tensors.get(piece.name)
        if there is None or there.shape != piece.shape:
            continue
        reader.fill(piece)
        try:
            torch.Generator("cpu" if name == "cpu" else run.device).set_state(state)
        except RuntimeError as error:
            raise DamagedCheckpoint(f"{reader.directory}: {piece.name} is not the state of a generator") from error
        found[name] = state
    return found


def _set_random_state(name: str, state: Tensor) -> None:
    (torch.set_rng_state if name == "cpu" else torch.cuda.set_rng_state)(state)


def _fill_window(run: Run, reader: Reader, window: Predictions) -> None:
    """The examples in equal parts over the ranks, however many those are now."""
    rows, all_examples = reader.index.tensors[WINDOW].shape
    examples, rest = divmod(all_examples, run.topology.world_size)
    if rest:
        return  # another batch size: the log's next line is of fewer examples
    shown = torch.empty(rows, examples, device=run.device)
    reader.fill(TensorSlice(WINDOW, reader.index.tensors[WINDOW].shape, (0, examples * run.topology.rank), shown))
    window.unpack(shown.where(shown != MISSING, torch.nan))


def _without_nan(window: Tensor) -> Tensor:
    """A checkpoint holds finite numbers alone; a label that is missing is a NaN."""
    logits, labels = window.chunk(2)
    return torch.cat([logits, labels.nan_to_num(MISSING)])
