"""torchrun with a rank's exit code instead of 1, without the traceback that would hide the ranks' messages, and
with a store that listens at the master's address alone.

python torchrun.py [torchrun's arguments]
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # by path
    sys.path[0] = str(Path(__file__).resolve().parents[2])  # not this directory, whose modules are no top-level ones


def main() -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import static_tcp_rendezvous
    from torch.distributed.run import main as torchrun

    from megarec.distributed.rendezvous import store_at

    def store(address: str, port: int, ranks: int, master: bool, timeout: float | timedelta, **_: Any) -> Any:
        limit = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
        return store_at(address, port, ranks, master, limit)

    static_tcp_rendezvous.TCPStore = store  # type: ignore[misc, assignment]
    try:
        torchrun()
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    main()
