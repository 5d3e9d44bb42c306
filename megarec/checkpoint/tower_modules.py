"""Tower modules of a checkpoint and those of a run: whether they fit, and the way back.

Every rank asks about the modules of all towers, on the meta device, so that all ranks come to the same answer.
"""

from pathlib import Path

import torch
from torch import Tensor

from megarec.checkpoint import compatibility
from megarec.checkpoint.format import Index
from megarec.checkpoint.pieces import Piece
from megarec.checkpoint.reading import Reader
from megarec.checkpoint.sparse import TOWERS
from megarec.errors import UserError
from megarec.towers.modules import TowerBank
from megarec.towers.optimizer import states_of
from megarec.towers.sizes import resolve_towers
from megarec.training.build import Run


def towers_of(run: Run) -> list[list[str]] | None:
    """Names of features by tower; None: the run has no towers."""
    towers = resolve_towers(run.config, run.layout).towers
    return None if towers is None else [list(features) for features in towers.features]


def start_afresh(run: Run, index: Index) -> bool:
    """Whether a load sets the modules to their first values: train.reset_towers allows it, and there is no other way.

    Where they fit they are loaded all the same: the run's own later checkpoints are loaded under the same config.
    """
    return run.config.train.reset_towers and not _fit(run, index)


def _fit(run: Run, index: Index) -> bool:
    """Whether a checkpoint has modules of the same towers and shapes as the run, or neither has any."""
    here = {name: tuple(like.shape) for name, like in _expected(run).items() if not _is_state(name)}
    there = {name: index.tensors[name].shape for name in _names(index) if not _is_state(name)}
    return here == there and (not here or index.towers == towers_of(run))


def check(run: Run, directory: Path, index: Index) -> None:
    """Raise a UserError that says what of the modules, or of their optimizer's states, does not fit this run."""
    if start_afresh(run, index):
        return
    there, here = bool(_names(index)), run.sparse.modules is not None
    towers = towers_of(run)
    if there != here or (here and index.towers != towers):
        raise UserError(
            f"{directory}: tower modules were trained for towers {_briefly(index.towers if there else None)}, this "
            f"run has {_briefly(towers if here else None)}; train.reset_towers=true keeps tables and over-arch and "
            "starts the modules afresh"
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
    stepped = {name.rpartition("/")[0] for name in _names(index) if _is_state(name)}
    expected = {
        name: tuple(like.shape)
        for name, like in _expected(run).items()
        if not _is_state(name) or name.rpartition("/")[0] in stepped
    }
    compatibility.check_tensors(directory, index, expected, (TOWERS,), run.config.model_dump(mode="json"))


def fill(run: Run, reader: Reader) -> None:
    """Set the modules on this rank from a checkpoint that `check` has found to fit, or afresh."""
    modules = run.sparse.modules
    if modules is None:
        return
    if start_afresh(run, reader.index):
        modules.start_afresh()
        return
    own = {TOWERS + name for name, _ in modules.bank.named_parameters()}
    state: dict[str, Tensor] = {}
    for name, like in _expected(run).items():
        parameter = name.rpartition("/")[0] if _is_state(name) else name
        if parameter in own and name in reader.index.tensors:
            room = torch.empty_like(like, device=run.device)
            reader.fill(Piece(name, tuple(room.shape), (0,) * room.dim(), room))
            state[name.removeprefix(TOWERS)] = room
    modules.load_state_dict(state)


def _expected(run: Run) -> dict[str, Tensor]:
    """Parameters of all towers' modules and the states of an optimizer that has stepped, on the meta device."""
    sizes = resolve_towers(run.config, run.layout).modules
    if sizes is None or run.sparse.modules is None:
        return {}
    with torch.device("meta"):
        bank = TowerBank(sizes, range(len(sizes.inputs)))
    states = states_of(run.sparse.modules.settings)
    found: dict[str, Tensor] = {}
    for name, parameter in bank.named_parameters():
        found[TOWERS + name] = parameter.detach()
        for what, state in states.items():
            like = parameter.detach() if state.dim() else state.to("meta")
            found[f"{TOWERS}{name}/{what}"] = like.to(state.dtype)
    return found


def _names(index: Index) -> list[str]:
    return [name for name in index.tensors if name.startswith(TOWERS)]


def _is_state(name: str) -> bool:
    """Of tower/<parameter>[/<state>]."""
    return "/" in name.removeprefix(TOWERS)


def _briefly(towers: list[list[str]] | None) -> str:
    text = str(towers) if towers is not None else "no modules"
    return text if len(text) <= 120 else text[:117] + "..."
