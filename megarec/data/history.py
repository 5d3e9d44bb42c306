"""What a user did before: features of the past, strictly earlier than the row they describe."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megarec.data.jagged import flat_positions

Int64 = NDArray[np.int64]


def past_items(user: Int64, item: Int64, timestamp: Int64, last: int) -> pa.ListArray:
    """The user's `last` most recent items before each row, oldest first.

    Rows with an equal timestamp are not each other's past. Where the cut to `last` falls among equal timestamps,
    the larger item ids stay, so that the order of rows in a file means nothing.

    Args:
        user, item, timestamp: int64 [n].

    Returns:
        list<int64> [n], each of at most `last` items.
    """
    n = len(user)
    order = np.lexsort((item, timestamp, user))
    position = np.arange(n)
    user, timestamp = user[order], timestamp[order]
    new_user = np.append(True, user[1:] != user[:-1])
    new_moment = new_user | np.append(True, timestamp[1:] != timestamp[:-1])
    first_of_user = np.maximum.accumulate(np.where(new_user, position, 0))
    end = np.maximum.accumulate(np.where(new_moment, position, 0))  # the past ends where the row's moment begins
    start = np.maximum(first_of_user, end - last)

    place = np.empty(n, np.int64)  # from a row to its position in the order
    place[order] = position
    start, lengths = start[place], (end - start)[place]
    values = item[order][flat_positions(start, lengths)]
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
