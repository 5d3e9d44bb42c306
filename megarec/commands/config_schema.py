"""The JSON schema of a run's file, for editors that complete and check as you type."""

import json

from megarec.config.load import json_schema
from megarec.errors import exits_cleanly


@exits_cleanly
def main() -> None:
    print(json.dumps(json_schema(), indent=2))


if __name__ == "__main__":
    main()
