"""One rule for each type of value, over all formats (docs/data.md lists them)."""

from collections.abc import Callable
from decimal import Decimal
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from megarec.data.preparation.table_reader import Part
from megarec.data.preparation.table_spec import Categorical, Lists, Numeric, Sequence
from megarec.data.preparation.text_files import first_failing
from megarec.errors import UserError

Owner = NDArray[np.int64] | None
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
_LISTS = (
    *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    *(pa.types.is_list_view, pa.types.is_large_list_view),
)
_DIGIT = np.full(256, 256, np.uint16)  # of a character; 256: it is none
_DIGIT[np.frombuffer(b"0123456789ABCDEFabcdef", np.uint8)] = [*range(16), *range(10, 16)]
_PAIR = (16 * _DIGIT + _DIGIT[:, None]).ravel()  # of two characters, the first in the low byte; 256 and more: none
_EXACT = {16: 2**11, 32: 2**24, 64: 2**53}  # below, a float with that many bits holds every whole number


def id_values(part: Part, name: str, column: Categorical) -> pa.Array:
    """The column's values as string or int64 [n]; a missing value is null."""
    return _typed(part, name, part.rows.column(name), column.dtype, None)


def id_lists(part: Part, name: str, column: Lists) -> tuple[pa.Array, NDArray[np.int64]]:
    """The column's values as string or int64 [sum(lengths)], row after row, and lengths int64 [n]."""
    values, owner, count = _elements(part, name, column)
    keep = _kept(values, owner, count, column)
    return values.filter(pa.array(keep)), np.bincount(owner[keep], minlength=count).astype(np.int64)


def _kept(values: pa.Array, owner: NDArray[np.int64], count: int, column: Lists) -> NDArray[np.bool_]:
    """Which elements of lists are kept: those that are there; of a sequence the newest of them."""
    keep: NDArray[np.bool_] = values.is_valid().to_numpy(zero_copy_only=False)
    if isinstance(column, Sequence):
        rows = owner[keep]
        lengths = np.bincount(rows, minlength=count)
        age = np.arange(len(rows)) - (np.cumsum(lengths) - lengths)[rows]
        if column.newest == "last":
            age = lengths[rows] - 1 - age
        keep = keep.copy()
        keep[keep] = age < column.max_length
    return keep


def weights(part: Part, name: str, of: str, column: Lists) -> NDArray[np.float32]:
    """The weights of the values that `id_lists` returns for the column `of`: float32 [sum(lengths)]."""
    ids, lists = (lists_of(part, column_name, column.separator) for column_name in (of, name))
    wanted, found = lengths_of(ids), lengths_of(lists)
    if (wanted != found).any():
        row = int((wanted != found).argmax())
        value = part.rows.column(name)[row].as_py()
        part.fail(row, name, value, f"{wanted[row]} weights, one for each value of {of!r}")
    values, owner, count = _elements(part, of, column)
    keep = _kept(values, owner, count, column)
    kept, owner = lists.flatten().filter(pa.array(keep)), owner[keep]
    with np.errstate(over="ignore"):
        result = as_float64(part, name, kept, "numbers", owner).astype(np.float32)
    if not np.isfinite(result).all():
        first = int(np.isfinite(result).argmin())
        part.fail(int(owner[first]), name, kept[first].as_py(), "finite numbers")
    return result


def numbers(part: Part, name: str, column: Numeric) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The column as float64 [n], missing ones filled with the column's value, if it has one; and which are present."""
    values = part.rows.column(name)
    found = as_float64(part, name, values, "a number")
    missing = np.isnan(found)
    if missing.any():
        if column.missing is None:
            row = int(missing.argmax())
            part.fail(row, name, values[row].as_py(), f"a number (or columns.{name}.missing in the spec, to fill in)")
        found = np.where(missing, column.missing, found)
    if column.log:
        found = np.sign(found) * np.log1p(np.abs(found))
    _check_finite(part, name, values, found)
    return found, ~missing


def bucket_values(part: Part, name: str) -> pa.Array:
    """The numbers of a bucketised column as float64 [n]; a missing one is null."""
    values = part.rows.column(name)
    found = as_float64(part, name, values, "a number")
    missing = np.isnan(found)
    _check_finite(part, name, values, np.where(missing, 0, found))
    return pa.array(found + 0.0, mask=missing)  # -0 is 0


def buckets(values: NDArray[np.float64], boundaries: list[float]) -> NDArray[np.int64]:
    """Int64 [n], the row of every number: 1 below the first boundary, one more from each boundary on."""
    return 1 + np.searchsorted(np.array(boundaries, np.float64), values, side="right").astype(np.int64)


def standardised(name: str, found: NDArray[np.float64], mean: float, deviation: float) -> NDArray[np.float32]:
    """(x - mean) / deviation as float32 [n].

    Raises:
        UserError: a number is too many deviations away for a float32.
    """
    with np.errstate(over="ignore"):
        result = ((found - mean) / deviation).astype(np.float32)
    if not np.isfinite(result).all():
        far = float(found[int(np.isfinite(result).argmin())])
        raise UserError(
            f"column {name!r}: {far:g} is too far from the mean {mean:g} of the training split for its deviation "
            f"{deviation:g}; leave out columns.{name}.standardise, or that row"
        )
    return result


def _check_finite(part: Part, name: str, values: pa.Array, found: NDArray[np.float64]) -> None:
    with np.errstate(over="ignore"):
        finite = np.isfinite(found.astype(np.float32))
    if not finite.all():
        row = int(finite.argmin())
        part.fail(row, name, values[row].as_py(), "a finite number")


def labels(part: Part, name: str, optional: bool) -> pa.Array:
    """The label column as int8 [n], 0 or 1, or null where it is optional and missing."""
    values = part.rows.column(name)
    found = as_float64(part, name, values, "0 or 1")
    missing = np.isnan(found) & optional
    bad = (found != 0) & (found != 1) & ~missing
    if bad.any():
        row = int(bad.argmax())
        remedy = "" if optional else f" (or columns.{name}.optional in the spec, to keep it missing)"
        part.fail(row, name, values[row].as_py(), "0 or 1" + remedy * bool(np.isnan(found[row])))
    return pa.array(np.where(missing, 0, found).astype(np.int8), mask=missing)


def canonical_text(values: pa.Array) -> pa.Array:
    """Text normalised as a category: 7.0 is 7 and True is true, as other formats write them; empty text is null."""

    def spelled(words: pa.Array) -> pa.Array:
        words = pc.replace_substring_regex(words, r"^(-?[0-9]+)\.0*$", r"\1")
        words = pc.replace_substring_regex(words, r"^-(0+)$", r"\1")
        words = pc.if_else(pc.match_substring_regex(words, r"^(True|TRUE|False|FALSE)$"), pc.utf8_lower(words), words)
        return pc.if_else(pc.equal(words, ""), None, words)

    return _each_distinct(values.cast(pa.string()), spelled)


def _each_distinct(values: pa.Array, change: Callable[[pa.Array], pa.Array]) -> pa.Array:
    """`change` of all values, made on the distinct ones only."""
    encoded = values.dictionary_encode()
    return change(encoded.dictionary).take(encoded.indices)


def _elements(part: Part, name: str, column: Lists) -> tuple[pa.Array, NDArray[np.int64], int]:
    """The elements of all lists, missing ones as null; the row of each; the number of rows."""
    lists = lists_of(part, name, column.separator)
    owner = np.repeat(np.arange(len(lists)), lengths_of(lists))
    return _typed(part, name, lists.flatten(), column.dtype, owner), owner, len(lists)


def lists_of(part: Part, name: str, separator: str) -> pa.Array:
    """A column as lists: text is cut at the separator; a column without any value is one of missing lists."""
    lists = plain(part, part.rows.column(name))
    if not any(fits(lists.type) for fits in _LISTS):
        if not pa.types.is_string(lists.type):
            raise UserError(f"{part.path}: column {name!r} is {lists.type}, expected text or a list")
        return pc.split_pattern(pc.if_else(pc.equal(lists, ""), None, lists), separator)
    if pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type):
        return lists
    if pa.types.is_fixed_size_list(lists.type):
        return lists.cast(pa.list_(lists.type.value_type))
    # Arrow 26 casts a view with a missing list to offsets that end too early.
    return pa.ListArray.from_arrays(
        pa.array(np.append(0, np.cumsum(lengths_of(lists))).astype(np.int32)), lists.flatten()
    )


def lengths_of(lists: pa.Array) -> NDArray[np.int64]:
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def plain(part: Part, values: pa.Array) -> pa.Array:
    """Without a dictionary; all kinds of text as string; a column without any value, and a null word, as missing."""
    if isinstance(values.type, pa.BaseExtensionType):
        values = values.storage
    if pa.types.is_run_end_encoded(values.type):
        values = pc.run_end_decode(values)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_null(values.type) or any(fits(values.type) for fits in _TEXT[1:]):
        values = values.cast(pa.string())
    return _without_null_words(values, part.null_words) if part.null_words else values


def _without_null_words(values: pa.Array, words: tuple[str, ...]) -> pa.Array:
    """Values whose text, normalised as a category, is one of the words, as missing."""
    kind = values.type
    if not pa.types.is_string(kind) and (not pa.types.is_primitive(kind) or _dated(kind)):
        return values
    known = canonical_text(pa.array(words, pa.string())).drop_null()
    return _each_distinct(
        values, lambda v: pc.if_else(pc.is_in(canonical_text(v.cast(pa.string())), value_set=known), None, v)
    )


def _dated(kind: pa.DataType) -> bool:
    return _counts_units(kind) or pa.types.is_date(kind) or pa.types.is_interval(kind)


def _typed(part: Part, name: str, values: pa.Array, dtype: str, owner: Owner) -> pa.Array:
    """Ids as string or int64; `owner` is the row of every value, None when value i is row i's."""
    values = plain(part, values)
    if any(fits(values.type) for fits in _BYTES):
        values = plain(part, _cast(part, name, values, pa.string(), "UTF-8 text", owner))
    if pa.types.is_floating(values.type):
        values = _whole(part, name, values, owner)
    elif pa.types.is_decimal(values.type):
        values = plain(part, _fixed_point(values.cast(pa.string())))
    elif _counts_units(values.type):
        raise UserError(
            f"{part.path}: column {name!r} is {values.type}, whose text and number depend on the unit; "
            "store integers or text"
        )
    if dtype == "hexadecimal":
        return _hexadecimal(part, name, values, owner)
    if dtype == "string":
        text = values if pa.types.is_string(values.type) else _cast(part, name, values, pa.string(), "text", owner)
        return canonical_text(text)
    if not pa.types.is_string(values.type):
        return _cast(part, name, values, pa.int64(), "an integer", owner)
    text = _true_is_one(canonical_text(values))
    odd = pc.invert(pc.match_substring_regex(text, r"^-?[0-9]+$"))
    if pc.any(odd).as_py():
        _fail(part, name, values, pc.index(odd, True).as_py(), "an integer", owner)
    return _cast(part, name, text, pa.int64(), "an integer of 64 bits", owner)


def _hexadecimal(part: Part, name: str, values: pa.Array, owner: Owner) -> pa.Array:
    """Hexadecimal digits, 1 to 15 of them, as int64; an empty text is missing."""
    if not pa.types.is_string(values.type):
        raise UserError(f"{part.path}: column {name!r} is {values.type}, expected text of hexadecimal digits")
    if (eight := _eight_digits(values)) is not None:
        return eight
    values = pc.if_else(pc.equal(values, ""), None, values)
    odd = pc.invert(pc.match_substring_regex(values, r"^[0-9A-Fa-f]{1,15}$"))
    if pc.any(odd).as_py():
        _fail(part, name, values, pc.index(odd, True).as_py(), "1 to 15 hexadecimal digits", owner)
    return _each_distinct(
        values,
        lambda words: pa.array([None if word is None else int(word, 16) for word in words.to_pylist()], pa.int64()),
    )


def _eight_digits(values: pa.Array) -> pa.Array | None:
    """`_hexadecimal`, two digits at once, where all values that are there have eight; None: some have not."""
    missing = values.null_count
    valid = values.is_valid().to_numpy(zero_copy_only=False) if missing else None
    _, ends, data = values.buffers()
    if missing == len(values) or data is None:
        return None
    offsets = np.frombuffer(ends, np.int32)[values.offset : values.offset + len(values) + 1]
    if (np.diff(offsets) != (8 if valid is None else valid * np.int32(8))).any():
        return None
    pairs = _PAIR[np.frombuffer(data, "<u2", 4 * (len(values) - missing), offsets[0])]
    if pairs.max() > 255:
        return None
    numbers = pairs.astype(np.uint8).view(">u4")
    if valid is None:
        return pa.array(numbers.astype(np.int64))
    found = np.zeros(len(values), np.int64)
    found[valid] = numbers
    return pa.array(found, mask=~valid)


def _whole(part: Part, name: str, values: pa.Array, owner: Owner) -> pa.Array:
    """Floats that name a category, as int64; NaN is missing. pandas writes integers with gaps as floats."""
    limit = _EXACT[values.type.bit_width]
    values = pc.if_else(pc.is_nan(values), None, values)
    found = pc.fill_null(values, pa.scalar(0, values.type)).to_numpy(zero_copy_only=False).astype(np.float64)
    for bad, expected in (
        (found != np.trunc(found), "an integer (no other float names a category); store integers or text"),
        (np.abs(found) >= limit, f"an id below {limit}: a larger {values.type} stands for several; store integers"),
    ):
        if bad.any():
            _fail(part, name, values, int(bad.argmax()), expected, owner)
    return pc.if_else(values.is_valid(), pa.array(found.astype(np.int64)), None)


def _fixed_point(text: pa.Array) -> pa.Array:
    """Arrow's text of decimals, which is 0E-10 for 0 and 1.2E-9 for small ones, without exponents: as files have it."""
    return _each_distinct(
        text,
        lambda words: pa.array(
            [None if word is None else format(Decimal(word), "f") for word in words.to_pylist()], pa.string()
        ),
    )


def _counts_units(kind: pa.DataType) -> bool:
    """Whether the same moment is another number, or other text, in another unit: a day is one in every file."""
    return pa.types.is_timestamp(kind) or pa.types.is_time(kind) or pa.types.is_duration(kind)


def _true_is_one(text: pa.Array) -> pa.Array:
    return _each_distinct(
        text, lambda words: pc.if_else(pc.equal(words, "true"), "1", pc.if_else(pc.equal(words, "false"), "0", words))
    )


def as_float64(part: Part, name: str, values: pa.Array, expected: str, owner: Owner = None) -> NDArray[np.float64]:
    """Numbers as float64 [n], a missing one as NaN; true is 1."""
    values = plain(part, values)
    if pa.types.is_integer(values.type):
        found = values.cast(pa.float64(), safe=False)  # rounded: only safe casts refuse inexact numbers
    else:
        try:
            found = values.cast(pa.float64())
        except pa.ArrowInvalid:
            text = _true_is_one(canonical_text(values)) if pa.types.is_string(values.type) else values
            try:
                found = text.cast(pa.float64())
            except pa.ArrowInvalid:
                _fail(part, name, values, first_failing(text, pa.float64()), expected, owner)
        except pa.ArrowNotImplementedError as error:
            raise UserError(f"{part.path}: column {name!r} is {values.type}, expected {expected}") from error
    return found.to_numpy(zero_copy_only=False)


def _cast(part: Part, name: str, values: pa.Array, kind: pa.DataType, expected: str, owner: Owner) -> pa.Array:
    try:
        return values.cast(kind)
    except pa.ArrowNotImplementedError as error:
        raise UserError(f"{part.path}: column {name!r} is {values.type}, expected {expected}") from error
    except pa.ArrowInvalid:
        _fail(part, name, values, first_failing(values, kind), expected, owner)


def _fail(part: Part, name: str, values: pa.Array, index: int, expected: str, owner: Owner) -> NoReturn:
    """Name the row of the value at `index`."""
    part.fail(index if owner is None else int(owner[index]), name, values[index].as_py(), expected)
