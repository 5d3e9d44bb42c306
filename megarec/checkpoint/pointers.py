"""Which checkpoint is the latest, and which the best: small files that name one. No torch: launchers ask as well."""

import re
from pathlib import Path

LATEST, BEST = "latest", "best"
NAME = re.compile(r"step-\d{9,}")


def name_of(step: int) -> str:
    return f"step-{step:09d}"


def pointed(checkpoints: Path, pointer: str) -> str | None:
    """The checkpoint that a pointer names, if it is there."""
    path = checkpoints / pointer
    name = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    return name if NAME.fullmatch(name) and (checkpoints / name).is_dir() else None
