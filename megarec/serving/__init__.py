"""A trained model outside the trainer: in torch (predictor.py), or as an export that scores raw rows (Scorer)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megarec.serving.scorer import Scorer

__all__ = ["Scorer"]


def __getattr__(name: str) -> Any:
    if name == "Scorer":  # when it is first asked for: onnxruntime is an extra
        from megarec.serving.scorer import Scorer

        return Scorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
