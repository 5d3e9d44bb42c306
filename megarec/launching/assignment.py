"""What a job tells each of its ranks, as one word that no shell and no launcher can change.

Launchers build remote command lines by joining words (DeepSpeed's pdsh runner leaves `$`, quotes and semicolons as they
are), so what users may write, paths and overrides, travels in URL-safe base64.
"""

import base64
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Assignment:
    """Attributes:
    job: an id of this start of the job.
    directory: the working directory on every host.
    command: what the Python interpreter of the rank runs: a script and its arguments.
    environment: variables of every rank.
    interfaces: by node, the network interface that reaches the others.
    grace: seconds that a rank which is asked to end has for its save.
    """

    job: str
    directory: str
    command: list[str]
    environment: dict[str, str]
    interfaces: list[str]
    grace: float = 60.0

    def encode(self) -> str:
        return base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode()

    @staticmethod
    def decode(word: str) -> "Assignment":
        return Assignment(**json.loads(base64.urlsafe_b64decode(word)))
