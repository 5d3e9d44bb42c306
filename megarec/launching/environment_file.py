"""`.deepspeed_env`: variables for every rank of a job, a line each, KEY=VALUE and nothing else."""

import re
from pathlib import Path

from megarec.errors import UserError

FILE_NAME = ".deepspeed_env"
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def read_environment(directories: list[Path]) -> dict[str, str]:
    """The variables of the files in these directories, the last one's first in rank.

    Raises:
        UserError: a line that is not KEY=VALUE, with file and line number: DeepSpeed's launcher would fail on it.
    """
    variables: dict[str, str] = {}
    for directory in directories:
        path = directory / FILE_NAME
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            key, separator, value = line.partition("=")
            if not separator or _KEY.fullmatch(key) is None:
                raise UserError(
                    f"{path}:{number}: {line!r}: expected KEY=VALUE; no comments, no blank lines, no 'export'"
                )
            variables[key] = value
    return variables
