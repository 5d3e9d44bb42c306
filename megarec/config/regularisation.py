"""How the rows of a table are regularised and updated: what `embedding` and `embedding.tables` say, for one table."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from megarec.config.base import Rate, Section

Rows = Literal["looked_up", "all"]


class L2Config(Section):
    """L2 of tables, where a plain number (L2 on what is looked up) is not enough."""

    weight: Rate = Field(
        description="rows all: weight x w is added to the gradient of a row w, or decays it, as weight_decay of "
        "torch's Adam and AdamW; rows looked_up: as the plain number"
    )
    rows: Rows = Field("looked_up", description="looked_up: what a batch looks up; all: every row at every step")
    coupled: bool = Field(
        True,
        description="true: part of the gradient, before the optimizer; false, for rows all: w -= learning rate x "
        "weight x w beside the optimizer, as AdamW",
    )


def _kind(value: Any) -> str:
    return "[object]" if isinstance(value, dict | L2Config) else "[number]"  # in brackets: no part of a key (load.py)


L2 = Annotated[Annotated[Rate, Tag("[number]")] | Annotated[L2Config, Tag("[object]")], Discriminator(_kind)]


@dataclass(frozen=True)
class TableRule:
    """What a table's update does besides the optimizer's step on the rows that a batch looked up.

    Attributes:
        all_rows: the optimizer steps every row at every step, as torch.optim's dense ones.
        coupled: L2 on all rows, in the gradient: g += coupled x w.
        decay: L2 on all rows beside it: w -= rate x decay x w at every step, before the step.
        stochastic: weights are rounded up or down at random, in proportion to what is nearer.
        clipped: the gradient is clipped by its norm over all tables, L2 on all rows included.
    """

    all_rows: bool = False
    coupled: float = 0.0
    decay: float = 0.0
    stochastic: bool = False
    clipped: bool = False

    @property
    def lazy_decay(self) -> bool:
        """Whether a row's missed decay waits until the row is touched, or the table saved."""
        return self.decay > 0 and not self.all_rows

    @property
    def reason(self) -> str | None:
        """The part of it that only the torch backend can do; None: nothing."""
        if self.all_rows:
            return "every row is updated at every step" + (", with L2" if self.coupled or self.decay else "")
        if self.decay:
            return "its rows decay at every step"
        if self.clipped:
            return "its gradient is clipped"
        return "its weights are rounded stochastically" if self.stochastic else None


def problem_of(where: str, l2: float | L2Config, update_rows: Rows | None, learning_rate: float) -> str | None:
    """What is wrong with the L2 of a table, or of all of them; None: nothing.

    Args:
        where: the key whose l2 it is.
        update_rows: of the same tables.
        learning_rate: embedding.learning_rate.
    """
    if not isinstance(l2, L2Config):
        return None
    if l2.rows == "looked_up" and not l2.coupled:
        return f"{where}.l2.coupled=false needs {where}.l2.rows='all': rows that are not looked up decay as well"
    if l2.rows == "all" and l2.coupled and l2.weight and update_rows == "looked_up":
        return (
            f"{where}.l2 is in the gradient of all rows (rows='all', coupled=true), and update_rows='looked_up' would "
            f"leave most of them; leave update_rows out, or take {where}.l2.coupled=false"
        )
    if not l2.coupled and (share := l2.weight * learning_rate) >= 1:
        return (
            f"{where}.l2.weight={l2.weight:g} x embedding.learning_rate={learning_rate:g} = {share:g}: a step would "
            "decay a row to nothing or beyond; expected less than 1"
        )
    return None
