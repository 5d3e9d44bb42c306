"""Scores raw rows from an export, with numpy and onnxruntime alone: no torch, no other module of megarec.

`megarec checkpoint export --format onnx` writes what it reads, and lays a copy of this folder beside it.
"""

from typing import TYPE_CHECKING, Any

from .bundle import RowError, ScoringError

if TYPE_CHECKING:
    from .scorer import Scorer

__all__ = ["RowError", "Scorer", "ScoringError"]


def __getattr__(name: str) -> Any:
    if name == "Scorer":  # when it is first asked for: onnxruntime takes a moment, and may not be there
        from .scorer import Scorer

        return Scorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
