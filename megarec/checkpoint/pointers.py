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
    name = ""
    if path.is_file():
        with path.open("rb") as file:
            name = file.read(200).decode(errors="replace").strip()
    return name if NAME.fullmatch(name) and (checkpoints / name).is_dir() else None
