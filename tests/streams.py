"""A stream of an accelerator on a machine without one: notes what it is asked for, in order."""

from types import SimpleNamespace


class Stream:
    """Takes the place of torch.Stream."""

    def __init__(self, said: list[str], name: str) -> None:
        self.said, self.name = said, name

    def __enter__(self) -> None:
        self.said.append(f"enter {self.name}")

    def __exit__(self, *_: object) -> None:
        self.said.append(f"leave {self.name}")

    def record_event(self) -> SimpleNamespace:
        self.said.append(f"{self.name} records")
        return SimpleNamespace(of=self.name, synchronize=lambda: self.said.append(f"host waits for {self.name}"))

    def wait_event(self, event: SimpleNamespace) -> None:
        self.said.append(f"{self.name} waits for {event.of}")
