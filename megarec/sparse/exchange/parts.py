"""An all-to-all of embeddings and the one of their gradients, by parts of a rank's examples: its micro-batches.

    part 0 ->           | part 1 -> ...            the embeddings of a part travel while the part before it computes
              compute 0 | <- part 0  compute 1     and so do the gradients of the part before it

A part is some rows of what goes to every rank, so that the receiver gets the same numbers, however many there are.
What goes to a rank may be several matrices of its examples one after another: sections, of each of which a part has
the same rows.
All ranks start the same messages in the same order, from the main thread. On an accelerator they run in the stream
that NCCL has for the group, one after the other; where one is waited for, the stream that computes waits, not the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megarec.distributed.collectives import Channel, Message, WireDtypes, start_all_to_all


class PartedExchange:
    """Starts the first part of the embeddings; collective, as are `arrive` and `leave`.

    Args:
        blocks: [numbers for all ranks], the block of a rank being sections, and a section its examples one after
            another.
        sections: numbers of each section of a block, the same for every rank.
        received: numbers that every rank has for this one.
        parts: divides the examples of a rank.
        purpose: for the ledger.
        messages: the types on the wire.

    Attributes:
        messages, parts: as given.
    """

    def __init__(
        self,
        blocks: Tensor,
        sections: Sequence[int],
        received: Sequence[int],
        channel: Channel,
        purpose: str,
        messages: WireDtypes,
        parts: int,
    ) -> None:
        self._blocks: Tensor | None = blocks.view(len(received), sum(sections))
        self._sections, self._received = ([size // parts for size in sizes] for sizes in (sections, received))
        self._sent = [sum(self._sections)] * len(received)
        self._channel, self._purpose, self.messages, self.parts = channel, purpose, messages, parts
        self._coming: Message | None = self._start(0)
        self._back: list[Message] = []

    def arrive(self, part: int) -> Tensor:
        """[numbers of all ranks], the blocks of the ranks for a part; parts are asked for in their order, each once.

        The next part is started: not earlier, or both would share the link and the first come later.
        """
        assert self._coming is not None
        received = self._coming.wait()
        more = part + 1 < self.parts
        self._coming = self._start(part + 1) if more else None  # what came is the caller's to keep or to forget
        if not more:
            self._blocks = None
        return received

    def leave(self, gradient: Tensor) -> None:
        """Start the gradient of a part on its way back; parts leave in their order.

        Args:
            gradient: [numbers of all ranks], as `arrive` returned them.
        """
        message = gradient.to(self.messages.backward)
        self._back.append(
            start_all_to_all(message, self._sent, self._received, self._channel, self._purpose, "backward")
        )

    def gradient(self) -> Tensor:
        """That of `blocks`, once all parts have left; waits for them. [ranks, numbers for one]."""
        arrived = [message.wait().view(len(self._sent), self._sent[0]) for message in self._back]
        if len(arrived) == 1:
            return arrived[0]
        by_part = [message.split(self._sections, dim=1) for message in arrived]
        return torch.cat([part for section in zip(*by_part, strict=True) for part in section], dim=1)

    def _start(self, part: int) -> Message:
        assert self._blocks is not None
        blocks = self._blocks
        if self.parts > 1:
            sections = blocks.split([size * self.parts for size in self._sections], dim=1)
            own = [s[:, part * size : (part + 1) * size] for s, size in zip(sections, self._sections, strict=True)]
            blocks = own[0] if len(own) == 1 else torch.cat(own, dim=1)
        message = blocks.to(self.messages.forward).reshape(-1)
        return start_all_to_all(message, self._received, self._sent, self._channel, self._purpose)


def rows_of(values: Tensor, part: int, parts: int) -> Tensor:
    """The rows of a part, of as many as there are examples."""
    size = values.shape[0] // parts
    return values[part * size : (part + 1) * size]


def columns_of(values: Tensor | None, part: int, parts: int) -> Tensor | None:
    """The columns of a part, of as many as there are examples."""
    return values if values is None or parts == 1 else rows_of(values.T, part, parts).T.contiguous()


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts; those of one without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
