"""Triton kernels of tables (sparse/tables/triton_backend.py): lookup in the order of the output, and the update.

A bag is a (slot, example). A slot has a key: the first row of its shard among all rows of the rank; key plus id is a
row's key. Sorted by key, stably, the occurrences of a row are a run, in the order of slots and then of the global
batch. A run of at most `PIECE` occurrences is summed and applied by one program (`update_short_runs`); a longer one is
cut into pieces of `PIECE` from its first occurrence on (`sum_pieces`, then `update_long_runs`). So the order of every
sum depends on the occurrences of its row alone: no atomics, and the same bits whatever else the rank holds.

Nothing here depends on how many runs there are: grids are upper bounds, and programs without work return.
Tables of equal width lie in one tensor [rows, COLUMNS]; sums and optimizer are float32 whatever the types.
"""

import triton
import triton.language as tl

PIECE = 256  # occurrences of a row that one program sums; part of the definition: another value rounds otherwise
UNROLL = 8  # gradient rows of a piece that are in flight at a time


@triton.jit(do_not_specialize=["examples"], do_not_specialize_on_alignment=["values", "offsets", "weights"])
def look_up(
    table: tl.tensor,
    values: tl.tensor,
    offsets: tl.tensor,
    weights: tl.tensor,
    slots: tl.tensor,
    first_rows: tl.tensor,
    starts: tl.tensor,
    output: tl.tensor,
    examples: tl.tensor,
    blocks: tl.tensor,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    JAGGED: tl.constexpr,
    WEIGHTED: tl.constexpr,
) -> None:
    """Sum the rows of `ROWS` bags of one slot into their columns of `output` [examples, WIDTH].

    Grid: slots of this width x blocks of examples.

    Args:
        slots: int32, the slots of this width.
        first_rows: int64, for all slots, the first row of their shards in `table`.
        starts: int32, for all slots, their first column in `output`; multiples of ALIGN, and so is WIDTH.
    """
    slot = tl.load(slots + tl.program_id(0) // blocks)
    example = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    valid = example < examples
    bag = slot * examples + example
    first_row = tl.load(first_rows + slot)
    column = tl.arange(0, BLOCK)
    inside = (column < COLUMNS)[None, :]
    if JAGGED:
        begin = tl.load(offsets + bag, valid, other=0)
        length = tl.load(offsets + bag + 1, valid, other=0) - begin
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for nth in range(tl.max(length, axis=0)):
            here = valid & (nth < length)
            row = first_row + tl.load(values + begin + nth, here, other=0)
            rows = tl.load(table + row[:, None] * COLUMNS + column[None, :], here[:, None] & inside, other=0.0)
            rows = rows.to(tl.float32)
            if WEIGHTED:
                rows *= tl.load(weights + begin + nth, here, other=0.0)[:, None]
            total += rows
    else:
        row = first_row + tl.load(values + bag, valid, other=0)
        rows = tl.load(table + row[:, None] * COLUMNS + column[None, :], valid[:, None] & inside, other=0.0)
        total = rows.to(tl.float32)
    start = tl.multiple_of(tl.load(starts + slot), ALIGN)
    place = example.to(tl.int64)[:, None] * WIDTH + (start + column)[None, :]
    tl.store(output + place, total, valid[:, None] & inside)


@triton.jit(do_not_specialize=["bags", "examples"], do_not_specialize_on_alignment=["values", "offsets"])
def find_keys(
    values: tl.tensor,
    offsets: tl.tensor,
    first_keys: tl.tensor,
    keys: tl.tensor,
    bag_of: tl.tensor,
    bags: tl.tensor,
    examples: tl.tensor,
    BLOCK: tl.constexpr,
    JAGGED: tl.constexpr,
) -> None:
    """The key of every value, and, where bags are jagged, its bag. Grid: blocks of bags."""
    bag = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = bag < bags
    first_key = tl.load(first_keys + bag // examples, valid, other=0)
    if JAGGED:
        begin = tl.load(offsets + bag, valid, other=0)
        length = tl.load(offsets + bag + 1, valid, other=0) - begin
        for nth in range(tl.max(length, axis=0)):
            here = valid & (nth < length)
            tl.store(keys + begin + nth, first_key + tl.load(values + begin + nth, here, other=0), here)
            tl.store(bag_of + begin + nth, bag, here)
    else:
        tl.store(keys + bag, first_key + tl.load(values + bag, valid, other=0), valid)


@triton.jit(do_not_specialize=["total"])
def find_runs(runs: tl.tensor, run_starts: tl.tensor, total: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Where every run starts, and behind the last one the number of all occurrences. Grid: blocks of occurrences.

    Args:
        runs: int32 [total], the number of the run of every occurrence, ascending from 0.
        run_starts: int32 [total + 1]; the first (runs + 1) are set.
    """
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = position < total
    run = tl.load(runs + position, valid, other=0)
    before = tl.load(runs + position - 1, valid & (position > 0), other=-1)
    tl.store(run_starts + run, position, valid & (run != before))
    tl.store(run_starts + run + 1, position + 1, valid & (position == total - 1))


@triton.jit
def _gradient_rows(
    position: tl.tensor,
    valid: tl.tensor,
    order: tl.tensor,
    bag_of: tl.tensor,
    weights: tl.tensor,
    starts: tl.tensor,
    gradient: tl.tensor,
    examples: tl.tensor,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    JAGGED: tl.constexpr,
    WEIGHTED: tl.constexpr,
) -> tl.tensor:
    """Of the occurrences at these positions of the sorted order: float32 [positions, BLOCK], 0 where not valid."""
    occurrence = tl.load(order + position, valid, other=0)
    bag = occurrence.to(tl.int32)
    if JAGGED:
        bag = tl.load(bag_of + occurrence, valid, other=0)
    slot = bag // examples
    start = tl.multiple_of(tl.load(starts + slot, valid, other=0), ALIGN)
    column = tl.arange(0, BLOCK)
    place = (bag - slot * examples).to(tl.int64)[:, None] * WIDTH + (start[:, None] + column[None, :])
    rows = tl.load(gradient + place, valid[:, None] & (column < COLUMNS)[None, :], other=0.0).to(tl.float32)
    if WEIGHTED:
        rows *= tl.load(weights + occurrence, valid, other=0.0)[:, None]
    return rows


@triton.jit
def _apply(
    gradient: tl.tensor,
    row: tl.tensor,
    valid: tl.tensor,
    table: tl.tensor,
    state: tl.tensor,
    rate: tl.tensor,
    eps: tl.tensor,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    OPTIMIZER: tl.constexpr,
) -> None:
    """The optimizer step (optimizers.py) of rows, given their summed gradients [rows, BLOCK]."""
    column = tl.arange(0, BLOCK)
    inside = valid[:, None] & (column < COLUMNS)[None, :]
    place = row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    if OPTIMIZER == "rowwise_adagrad":
        mean_square = tl.div_rn(tl.sum(gradient * gradient, axis=1), COLUMNS * 1.0)
        square_sum = tl.load(state + row, valid, other=1.0) + mean_square
        tl.store(state + row, square_sum, valid)
        change = gradient * tl.div_rn(-rate, tl.sqrt_rn(square_sum) + eps)[:, None]
    elif OPTIMIZER == "adagrad":
        square_sums = tl.load(state + place, inside, other=1.0) + gradient * gradient
        tl.store(state + place, square_sums, inside)
        change = tl.div_rn(gradient, tl.sqrt_rn(square_sums) + eps) * -rate
    else:
        tl.static_assert(OPTIMIZER == "sgd")
        change = gradient * -rate
    tl.store(table + place, tl.load(table + place, inside, other=0.0).to(tl.float32) + change, inside)


@triton.jit(do_not_specialize=["first", "last", "examples"], do_not_specialize_on_alignment=["weights"])
def update_short_runs(
    keys: tl.tensor,
    runs: tl.tensor,
    run_starts: tl.tensor,
    order: tl.tensor,
    bag_of: tl.tensor,
    weights: tl.tensor,
    starts: tl.tensor,
    gradient: tl.tensor,
    table: tl.tensor,
    state: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    first_key: tl.tensor,
    examples: tl.tensor,
    rate: tl.tensor,
    eps: tl.tensor,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    JAGGED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    OPTIMIZER: tl.constexpr,
    LONGEST: tl.constexpr,
) -> None:
    """Sum the gradients of `ROWS` runs in order, and update their rows. Grid: last - first occurrences, by ROWS.

    Args:
        keys: sorted.
        first, last: the positions of this width's occurrences in the sorted order, last excluded.
        first_key: of the first row of `table`.
    """
    run = tl.load(runs + first) + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = run <= tl.load(runs + last - 1)
    begin = tl.load(run_starts + run, valid, other=0)
    length = tl.load(run_starts + run + 1, valid, other=0) - begin
    valid = valid & (length <= LONGEST)
    longest = tl.max(tl.where(valid, length, 0), axis=0)
    if longest == 0:
        return
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for nth in range(longest):
        total += _gradient_rows(
            begin + nth, valid & (nth < length), order, bag_of, weights, starts, gradient, examples,
            COLUMNS, WIDTH, ALIGN, BLOCK, JAGGED, WEIGHTED,
        )  # fmt: skip
    row = tl.load(keys + begin, valid, other=0) - first_key
    _apply(total, row, valid, table, state, rate, eps, COLUMNS, BLOCK, OPTIMIZER)


@triton.jit
def _piece(
    number: tl.tensor, runs: tl.tensor, run_starts: tl.tensor, first: tl.tensor, last: tl.tensor, LONGEST: tl.constexpr
) -> tl.tensor:
    """The piece of a long run that program `number` owns: where it, its run, and what follows the run begin.

    Two programs share a block of LONGEST positions: a long run that was there before it has one piece that begins in
    it (the even program's), and so has one that begins in it (the odd one's); a third is too long to fit between.
    Without such a piece the program's begins where its run ends.
    """
    low = first + number // 2 * LONGEST
    before = tl.load(runs + low)
    after = tl.load(runs + tl.minimum(low + LONGEST, last) - 1)
    odd = number % 2 == 1
    run = tl.where(odd, after, before)
    begin = tl.load(run_starts + run)
    end = tl.load(run_starts + run + 1)
    piece = begin + tl.where(odd, 0, tl.cdiv(low - begin, LONGEST) * LONGEST)
    none = (end - begin <= LONGEST) | (odd & (before == after)) | (piece >= end)
    return tl.where(none, end, piece), begin, end


@triton.jit(do_not_specialize=["first", "last", "examples"], do_not_specialize_on_alignment=["weights"])
def sum_pieces(
    runs: tl.tensor,
    run_starts: tl.tensor,
    order: tl.tensor,
    bag_of: tl.tensor,
    weights: tl.tensor,
    starts: tl.tensor,
    gradient: tl.tensor,
    sums: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    examples: tl.tensor,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    JAGGED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LONGEST: tl.constexpr,
    FLIGHT: tl.constexpr,
) -> None:
    """Sum the gradients of the piece of every program (`_piece`) in order: its row of `sums`, float32 [., COLUMNS].

    Grid: two for each LONGEST of the last - first occurrences.
    """
    piece, _, end = _piece(tl.program_id(0), runs, run_starts, first, last, LONGEST)
    if piece == end:
        return
    stop = tl.minimum(piece + LONGEST, end)
    total = tl.zeros([1, BLOCK], tl.float32)
    for position in range(piece, stop, FLIGHT):
        for nth in tl.static_range(FLIGHT):
            here = position + nth + tl.arange(0, 1)
            total += _gradient_rows(
                here, here < stop, order, bag_of, weights, starts, gradient, examples,
                COLUMNS, WIDTH, ALIGN, BLOCK, JAGGED, WEIGHTED,
            )  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    tl.store(sums + tl.program_id(0).to(tl.int64) * COLUMNS + column, total, column < COLUMNS)


@triton.jit(do_not_specialize=["first", "last"])
def update_long_runs(
    keys: tl.tensor,
    runs: tl.tensor,
    run_starts: tl.tensor,
    sums: tl.tensor,
    table: tl.tensor,
    state: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    first_key: tl.tensor,
    rate: tl.tensor,
    eps: tl.tensor,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    OPTIMIZER: tl.constexpr,
    LONGEST: tl.constexpr,
) -> None:
    """Add up the pieces of every long run in order, and update its row. Grid: as of `sum_pieces`.

    The program that owns the first piece does it. The others begin LONGEST apart: one in each block that follows, of
    a run that was there before it.
    """
    number = tl.program_id(0)
    piece, begin, end = _piece(number, runs, run_starts, first, last, LONGEST)
    if (piece == end) | (piece != begin):
        return
    column = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([1, BLOCK], tl.float32)
    for nth in range(tl.cdiv(end - begin, LONGEST)):
        owner = tl.where(nth == 0, number, (number // 2 + nth) * 2)
        total += tl.load(sums + owner.to(tl.int64) * COLUMNS + column, column < COLUMNS, other=0.0)
    one = tl.arange(0, 1)
    row = tl.load(keys + begin + one) - first_key
    _apply(total, row, one == 0, table, state, rate, eps, COLUMNS, BLOCK, OPTIMIZER)
