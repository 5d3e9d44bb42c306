"""megarec: Wukong-class recommendation models on DeepSpeed. One model, any topology, the same numbers."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`megarec.load_model`, imported when it is first asked for: torch takes seconds."""
    if name == "load_model":
        from megarec.serving.predictor import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
