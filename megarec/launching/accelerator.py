"""What this machine computes on."""

from pathlib import Path


def accelerator() -> str:
    """What DeepSpeed would find out by itself, with a warning."""
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
