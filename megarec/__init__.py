"""megarec: Wukong-class recommendation models on DeepSpeed. One model, any topology, the same numbers."""

__version__ = "0.1.0"
