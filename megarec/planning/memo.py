"""What a search would work out again and again: answers that are kept, by what they depend on.

    @remembered(lambda config, spec, examples: (Same(spec), examples, config.dense.recompute))
    def dense_ops(config, spec, examples): ...

A function is given a whole config and depends on little of it; the key says on what. Two plans that differ in their
ZeRO stage then share the operations of the dense model, and two that differ in recomputation share the tables' places.
The answer must not be changed by who gets it. An error is not kept.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

Given = ParamSpec("Given")
Answer = TypeVar("Answer")
KEPT = 64  # answers of a function


class Same:
    """A value that equals itself alone: models, and where millions of shards lie, are not compared part by part.

    It keeps the value, so that no other can take its place and its identity.
    """

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value


def remembered(
    key: Callable[Given, Hashable], kept: int = KEPT
) -> Callable[[Callable[Given, Answer]], Callable[Given, Answer]]:
    """Keep a function's latest answers.

    Args:
        key: of the function's arguments: what its answer depends on.
        kept: how many answers; the one that was not asked for the longest goes first.
    """

    def wrap(function: Callable[Given, Answer]) -> Callable[Given, Answer]:
        answers: OrderedDict[Hashable, Any] = OrderedDict()

        @wraps(function)
        def ask(*args: Given.args, **kwargs: Given.kwargs) -> Answer:
            asked = key(*args, **kwargs)
            if asked not in answers:
                answers[asked] = function(*args, **kwargs)
                if len(answers) > kept:
                    answers.popitem(last=False)
            answers.move_to_end(asked)
            found: Answer = answers[asked]
            return found

        return ask

    return wrap
