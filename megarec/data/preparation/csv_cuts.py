"""Where rows of a CSV file start, so that several processes can read it: one pass at the speed of memory.

A line end in quotes does not end a row, and a part of a file does not show whether it begins in quotes. Counting does:
every second quote ends what the one before began, if quotes stand as RFC 4180 has them. One that begins a value follows
a delimiter or a line end, one that ends a value has one after it, and one in a value is doubled, which counts as an end
and a beginning. Every quote is checked. From the first one elsewhere (a quote within a value that does not begin with
one is a character) nothing is cut: one process reads the rest.
"""

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

_BLOCK_BYTES = 1 << 22
_QUOTE, _LINE_FEED = ord('"'), ord("\n")
Places = NDArray[np.int64]


def row_starts(file: BinaryIO, size: int, delimiter: str, every: int) -> list[int]:
    """Offsets in a CSV file at which a row starts, about evenly spaced; none if lines do not end in a line feed.

    Args:
        file: at the first byte of its rows, behind a byte-order mark.
    """
    found: list[int] = []
    target = every
    begun = file.tell()
    for start, block, quotes, inside in _blocks(file, begun, delimiter):
        while target <= start + len(block):
            if (after := _line_end(block, max(target - 1 - start, 0), quotes, inside)) is None:
                break
            if start + after >= size:
                return found
            found.append(start + after)
            target = max(target + every, start + after + 1)
    return found


def end_of_rows(block: bytes, delimiter: str, end_of_row: bytes, last: bool) -> int | None:
    """Where the last whole row of a block ends, which begins with a row; None: quotes do not show it.

    Args:
        last: nothing follows, so that the end of the block is one of a row, but in quotes.
    """
    if (quotes := _quotes(b"\n", block, b"\n", False, delimiter)) is None:
        return None
    if last:
        return None if len(quotes) % 2 else len(block)
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == end_of_row[0])
    outside = np.flatnonzero(np.searchsorted(quotes, ends) % 2 == 0)
    return int(ends[outside[-1]]) + 1 if len(outside) else 0


def _blocks(file: BinaryIO, start: int, delimiter: str) -> Iterator[tuple[int, bytes, Places, bool]]:
    """Blocks, as long as it is sure: (first byte, bytes, where quotes are, whether it begins in quotes)."""
    inside = False
    before, block = b"\n", file.read(_BLOCK_BYTES)
    while block:
        after = file.read(_BLOCK_BYTES)
        if (quotes := _quotes(before, block, after[:1] or b"\n", inside, delimiter)) is None:
            return
        yield start, block, quotes, inside
        inside ^= bool(len(quotes) % 2)
        start += len(block)
        before, block = block[-1:], after


def _quotes(before: bytes, block: bytes, after: bytes, inside: bool, delimiter: str) -> Places | None:
    """Where the quotes of a block are; None: one is where RFC 4180 has none.

    Args:
        before, after: the byte on either side.
        inside: whether the block begins in quotes.
    """
    if b'"' not in block:
        return np.zeros(0, np.int64)
    text = np.frombuffer(before + block + after, np.uint8)
    quotes = np.flatnonzero(text[1:-1] == _QUOTE)
    fits = np.zeros(256, bool)
    fits[[_QUOTE, _LINE_FEED, ord("\r"), ord(delimiter)]] = True
    begin, end = quotes[inside::2], quotes[not inside :: 2]
    return quotes if fits[text[begin]].all() and fits[text[end + 2]].all() else None


def _line_end(block: bytes, least: int, quotes: Places, inside: bool) -> int | None:
    """The place after the first line feed from `least` on that is not in quotes; None: the block has none."""
    if not len(quotes):
        return None if inside else block.find(b"\n", least) + 1 or None
    ends = np.flatnonzero(np.frombuffer(block, np.uint8)[least:] == _LINE_FEED) + least
    outside = (np.searchsorted(quotes, ends) + inside) % 2 == 0
    return int(ends[outside.argmax()]) + 1 if outside.any() else None
