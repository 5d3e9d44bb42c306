"""Scores raw rows from an export, with numpy and onnxruntime alone: no torch, no other module of megarec.

`megarec checkpoint export --format onnx` writes what it reads, and lays a copy of this folder beside it.
"""

from .bundle import RowError, ScoringError
from .scorer import Scorer

__all__ = ["RowError", "Scorer", "ScoringError"]
