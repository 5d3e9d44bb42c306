"""A stream of an accelerator on a machine without one: notes what it is asked for, in order."""

from types import SimpleNamespace


class Stream:
    """Takes the place of torch.Stream."""

    def __init__(self, events: list[str], name: str) -> None:
        self.events, self.name = events, name

    def __enter__(self) -> None:
        self.events.append(f"enter {self.name}")

    def __exit__(self, *_: object) -> None:
        self.events.append(f"leave {self.name}")

    def record_event(self) -> SimpleNamespace:
        self.events.append(f"{self.name} records")
        return SimpleNamespace(of=self.name, synchronize=lambda: self.events.append(f"host waits for {self.name}"))

    def wait_event(self, event: SimpleNamespace) -> None:
        self.events.append(f"{self.name} waits for {event.of}")
