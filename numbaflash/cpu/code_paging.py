"""Pages of codes, compiled: what queries see of quantized layers, as rows of run tables."""

from __future__ import annotations

from .jit import kernel, native
from .paging import list_stretches, ring_at, store_run
from .record import Record, record_at
from .runs import RUN_FIELDS
from .vector import load_int, store_int

__all__ = ["CodePages", "Part", "list_parts"]

_ROW = 8 * RUN_FIELDS
_PARAMETERS_ROW = 8 * 2


class CodePages(
    Record, integers=("pages", "slots", "row_bytes", "key_head", "value_head", "values", "parameters", "window")
):
    """A layer's pages of codes, as the function below sees them; see `cache.page_format.PageFormat`.

    `pages` is the address of the page table: for each of the slots, the address of its page. From there it is `values`
    bytes to the first head's values, and from a head's codes `parameters` bytes to their scales. `window` is the
    cache's.
    """


class Part(
    Record,
    integers=("ring", "codes", "first", "own", "start", "stop", "keys", "values", "new_page", "new_pages"),
):
    """Queries of a layer that lie in one page, `own`: those from `start` to `stop`.

    They see pages of codes from `first` on, by their numbers behind the sink tokens. `ring` and `codes` are addresses
    of the layer's RingRecord and CodePages. Tokens that the ring does not hold yet lie at `keys` and `values`; pages of
    the number `new_page` and above are no slot's yet, but lie at the addresses at `new_pages`.
    """


_code_pages_at = record_at(CodePages.dtype)
_part_at = record_at(Part.dtype)
_PART_BYTES = Part.dtype.itemsize


@native
def _list_new(length, start, stop, keys, k_token, k_head, values, v_token, v_head, row):
    """Write the run of the new tokens `start` to `stop`, if there are any; the address behind it."""
    if start >= stop:
        return row
    inside = start - length
    k, v = keys + inside * k_token, values + inside * v_token
    store_run(row, k, v, start, stop - start, k_token, k_head, v_token, v_head)
    return row + _ROW


@native
def _clear_parameters(address, behind):
    for at in range(address, behind, 8):
        store_int(at, 0)


@native
def _list_part(part, k_token, k_head, v_token, v_head, row, to):
    """Write what a part's queries see as rows of both tables; the address behind the rows of the first."""
    ring, codes = ring_at(part.ring), _code_pages_at(part.codes)
    length, table, parameters = ring.length, row, to
    sinks = min(ring.sink_tokens, part.stop)
    row = list_stretches(ring, 0, min(sinks, length), row)
    row = _list_new(length, length, sinks, part.keys, k_token, k_head, part.values, v_token, v_head, row)
    to += (row - table) // _ROW * _PARAMETERS_ROW
    _clear_parameters(parameters, to)

    for page in range(part.first, part.own):
        address = (
            load_int(part.new_pages + 8 * (page - part.new_page))
            if page >= part.new_page
            else load_int(codes.pages + 8 * (page % codes.slots))
        )
        k, v = address, address + codes.values
        start = ring.sink_tokens + page * ring.page_size
        store_run(row, k, v, start, ring.page_size, codes.row_bytes, codes.key_head, codes.row_bytes, codes.value_head)
        store_int(to, k + codes.parameters)
        store_int(to + 8, v + codes.parameters)
        row += _ROW
        to += _PARAMETERS_ROW

    begin = ring.sink_tokens + part.own * ring.page_size
    row = list_stretches(ring, begin, min(part.stop, length), row)
    start = max(begin, length)
    row = _list_new(length, start, part.stop, part.keys, k_token, k_head, part.values, v_token, v_head, row)
    _clear_parameters(to, parameters + (row - table) // _ROW * _PARAMETERS_ROW)
    return row


@kernel
def list_parts(parts, count, k_token, k_head, v_token, v_head, sides, bounds, table, parameters):
    """Write what the queries of each part see: rows of `Visibility`, `KVRuns` and `Codes`.

    That is the sink tokens, pages of codes, and the tokens of their own page. A part takes a row for each of its ring's
    sink slots and of its pages of codes, and three more at most.

    Args:
        parts: Address of
        count: so many Parts.
        k_token: Bytes between new tokens' keys,
        k_head: and between heads,
        v_token: and of values
        v_head: likewise.
        sides: Address of `Visibility.rows`.
        bounds: Address of `KVRuns.bounds`.
        table: Address of `KVRuns.table`.
        parameters: Address of `Codes.parameters`.

    Returns:
        The number of rows.
    """
    row = table
    store_int(bounds, 0)
    for n in range(count):
        part = _part_at(parts + n * _PART_BYTES)
        store_int(sides + 8 * n, part.start)
        store_int(sides + 8 * (count + n), _code_pages_at(part.codes).window - 1)
        store_int(sides + 8 * (2 * count + n), 0)
        store_int(sides + 8 * (3 * count + n), ring_at(part.ring).sink_tokens)
        to = parameters + (row - table) // _ROW * _PARAMETERS_ROW
        row = _list_part(part, k_token, k_head, v_token, v_head, row, to)
        store_int(bounds + 8 * (n + 1), (row - table) // _ROW)
    return (row - table) // _ROW
