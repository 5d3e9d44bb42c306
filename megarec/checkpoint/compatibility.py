"""Whether a checkpoint fits a run; the first difference is named. Tower modules may be reset where they do not fit.

Every rank asks about the modules of all towers, on the meta device, so that all ranks come to the same answer.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarec.checkpoint.format import Index
from megarec.checkpoint.reading import Reader
from megarec.checkpoint.sparse import TOWERS
from megarec.data.schema import identity_difference
from megarec.errors import UserError
from megarec.run.build import Run
from megarec.slices import Ints, TensorSlice
from megarec.sparse.towers.modules import TowerModules
from megarec.sparse.towers.replicas import states_of


def described(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a schema that decides shapes: not counts of rows, mean lengths, orders and texts for people."""
    kept = {key: schema.get(key) for key in ("categorical", "numeric", "label")}
    kept["tasks"] = schema.get("tasks") or []  # an earlier version had one label
    features = kept["categorical"]
    if not isinstance(features, list) or not all(isinstance(feature, dict) for feature in features):
        return kept
    return kept | {
        "categorical": [{key: f[key] for key in f if key not in ("mean_length", "newest")} for f in features]
    }


def check_schema(directory: Path, index: Index, schema: Mapping[str, Any]) -> None:
    """Raise a UserError that names the first feature or key that differs."""
    for key, there, here in differences(described(index.data_schema), described(schema), "schema"):
        raise UserError(f"{directory} was trained on other data: {key} is {short(there)} there, {short(here)} here")
    there = index.data_schema.get("identity")
    if other := identity_difference(there if isinstance(there, dict) else {}, schema.get("identity", {})):
        raise UserError(f"{directory} was trained on other data: {other}")


def check_optimizer(directory: Path, index: Index, here: str) -> None:
    if _family(index.optimizer) != _family(here):
        raise UserError(
            f"{directory}: the dense optimizer was {index.optimizer}, this run's is {here}; resume with the "
            "dense.optimizer (or deepspeed.optimizer) it was written with"
        )


def _family(optimizer: str) -> str:
    return "adam" if is_adam(optimizer) else optimizer.lower()


def is_adam(optimizer: str) -> bool:
    """Whether an optimizer's class keeps two moments under Adam's names."""
    return "adam" in optimizer.lower() and "adamax" not in optimizer.lower()


def check_tensors(
    directory: Path,
    index: Index,
    expected: Mapping[str, Ints],
    prefixes: tuple[str, ...],
    config: Mapping[str, Any],
) -> None:
    """Raise a UserError that names the first tensor that is missing, of another shape, or unknown.

    Args:
        expected: shapes by name.
        prefixes: of the names that must be expected.
        config: of this run, for the key of the config that may be the reason.
    """
    for name, shape in expected.items():
        there = index.tensors.get(name)
        if there is None or there.shape != shape:
            what = "not there" if there is None else f"{list(there.shape)} there"
            raise UserError(f"{directory}: {name} is {what}, {list(shape)} in this run{_why(index, config)}")
    for name in index.tensors:
        if name.startswith(prefixes) and name not in expected:
            raise UserError(f"{directory}: {name} is there, but not in this run{_why(index, config)}")


def _why(index: Index, config: Mapping[str, Any]) -> str:
    for section in ("model", "tower_module", "embedding", "dense", "data"):
        known, own = index.config.get(section), config.get(section)
        if isinstance(known, dict) and isinstance(own, dict):  # a key that an earlier version lacked is not a reason
            own = {key: value for key, value in own.items() if key in known}
        for key, there, here in differences(known, own, section):
            if key not in ("embedding.placement", "embedding.backend", "data.path"):
                return f" ({key}: {short(there)} there, {short(here)} here); resume with its config"
    return "; resume with the config it was written with"


def differences(there: Any, here: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """(key, value there, value here) of everything that differs in two JSON values."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*there, *here]):
            yield from differences(there.get(key), here.get(key), f"{path}.{key}")
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for position, (a, b) in enumerate(zip(there, here, strict=True)):
            name = b.get("name") if isinstance(b, dict) else None
            yield from differences(a, b, f"{path}.{name or position}")
    elif there != here:
        yield path, there, here


def short(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def towers_of(run: Run) -> list[list[str]] | None:
    """Names of features by tower; None: the run has no towers."""
    towers = run.spec.towers.towers
    return None if towers is None else [list(features) for features in towers.features]


def resets_towers(run: Run, index: Index) -> bool:
    """Whether a load sets the modules to their first values: train.reset_towers allows it, and they do not fit.

    Modules that fit are still loaded: the run's own later checkpoints are loaded under the same config.
    """
    return run.config.train.reset_towers and not _towers_fit(run, index)


def _towers_fit(run: Run, index: Index) -> bool:
    """Whether a checkpoint has modules of the same towers and shapes as the run, or neither has any."""
    here = {name: tuple(like.shape) for name, like in _expected_towers(run).items() if not _is_state(name)}
    there = {name: index.tensors[name].shape for name in _tower_names(index) if not _is_state(name)}
    return here == there and (not here or index.towers == towers_of(run))


def check_tower_modules(run: Run, directory: Path, index: Index) -> None:
    """Raise a UserError that names what does not fit this run, in the modules or their optimizer's states."""
    if resets_towers(run, index):
        return
    there, here = bool(_tower_names(index)), run.sparse.modules is not None
    towers = towers_of(run)
    if there != here or (here and index.towers != towers):
        raise UserError(
            f"{directory}: tower modules were trained for towers {_briefly(index.towers if there else None)}, this "
            f"run has {_briefly(towers if here else None)}; train.reset_towers=true keeps tables and dense model and "
            "starts the modules from scratch"
        )
    if run.sparse.modules is None:
        return
    optimizer = run.sparse.modules.settings.optimizer
    if index.tower_optimizer not in (None, optimizer):
        raise UserError(
            f"{directory}: the optimizer of the tower modules was {index.tower_optimizer}, this run's is {optimizer}; "
            "resume with the tower_module.optimizer (or dense.optimizer) it was written with"
        )
    # Before its first step an optimizer has no states; after it, it has all of those of a parameter that it stepped.
    stepped = {name.rpartition("/")[0] for name in _tower_names(index) if _is_state(name)}
    expected = {
        name: tuple(like.shape)
        for name, like in _expected_towers(run).items()
        if not _is_state(name) or name.rpartition("/")[0] in stepped
    }
    check_tensors(directory, index, expected, (TOWERS,), run.config.model_dump(mode="json"))


def fill_tower_modules(run: Run, reader: Reader) -> None:
    """Set the modules on this rank from a checkpoint that `check` has found to fit, or from scratch."""
    modules = run.sparse.modules
    if modules is None:
        return
    if resets_towers(run, reader.index):
        modules.reset()
        return
    own = {TOWERS + name for name, _ in modules.bank.named_parameters()}
    state: dict[str, Tensor] = {}
    for name, like in _expected_towers(run).items():
        parameter = name.rpartition("/")[0] if _is_state(name) else name
        if parameter in own and name in reader.index.tensors:
            room = torch.empty_like(like, device=run.device)
            reader.fill(TensorSlice(name, tuple(room.shape), (0,) * room.dim(), room))
            state[name.removeprefix(TOWERS)] = room
    modules.load_state_dict(state)


def _expected_towers(run: Run) -> dict[str, Tensor]:
    """Parameters of all towers' modules and the states of an optimizer that has stepped, on the meta device."""
    sizes = run.spec.towers.modules
    if sizes is None or run.sparse.modules is None:
        return {}
    with torch.device("meta"):
        bank = TowerModules(sizes, range(len(sizes.inputs)))
    states = states_of(run.sparse.modules.settings)
    found: dict[str, Tensor] = {}
    for name, parameter in bank.named_parameters():
        found[TOWERS + name] = parameter.detach()
        for what, state in states.items():
            like = parameter.detach() if state.dim() else state.to("meta")
            found[f"{TOWERS}{name}/{what}"] = like.to(state.dtype)
    return found


def _tower_names(index: Index) -> list[str]:
    return [name for name in index.tensors if name.startswith(TOWERS)]


def _is_state(name: str) -> bool:
    """Of tower/<parameter>[/<state>]."""
    return "/" in name.removeprefix(TOWERS)


def _briefly(towers: list[list[str]] | None) -> str:
    text = str(towers) if towers is not None else "no modules"
    return text if len(text) <= 120 else text[:117] + "..."
