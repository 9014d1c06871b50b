"""Pages of codes, compiled: what queries see of quantized layers, as rows of run tables."""

from __future__ import annotations

from .jit import kernel, native
from .paging import list_stretches, ring_at, store_run
from .record import Record, record_at
from .runs import RUN_FIELDS
from .vector import load_int, store_int

__all__ = ["CodePages", "list_parts"]

_ROW = 8 * RUN_FIELDS
_PARAMETERS_ROW = 8 * 2


class CodePages(
    Record, integers=("ring", "pages", "slots", "row_bytes", "key_head", "value_head", "values", "parameters", "window")
):
    """A quantized layer, as the function below sees it; see `cache.page_format.PageFormat`.

    `ring` is the address of the RingRecord of its tokens in float16, `pages` that of the page table: for each of the
    slots, the address of its page of codes. From there it is `values` bytes to the first head's values, and from a
    head's codes `parameters` bytes to their scales. `window` is the cache's.
    """


_code_pages_at = record_at(CodePages.dtype)


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
def _list_part(codes, start, stop, own, keys, k_token, k_head, values, v_token, v_head, new_page, new_pages, row, to):
    """Write what queries in a page see as rows of both tables; the address behind the rows of the first."""
    ring = ring_at(codes.ring)
    length, sink_tokens, page_size, table, parameters = ring.length, ring.sink_tokens, ring.page_size, row, to
    sinks = min(sink_tokens, stop)
    row = list_stretches(ring, 0, min(sinks, length), row)
    row = _list_new(length, length, sinks, keys, k_token, k_head, values, v_token, v_head, row)
    to += (row - table) // _ROW * _PARAMETERS_ROW
    _clear_parameters(parameters, to)

    for page in range(max(start - codes.window + 1 - sink_tokens, 0) // page_size, own):
        address = (
            load_int(new_pages + 8 * (page - new_page))
            if new_pages != 0 and page >= new_page
            else load_int(codes.pages + 8 * (page % codes.slots))
        )
        k, v, first = address, address + codes.values, sink_tokens + page * page_size
        store_run(row, k, v, first, page_size, codes.row_bytes, codes.key_head, codes.row_bytes, codes.value_head)
        store_int(to, k + codes.parameters)
        store_int(to + 8, v + codes.parameters)
        row += _ROW
        to += _PARAMETERS_ROW

    begin = sink_tokens + own * page_size
    row = list_stretches(ring, begin, min(stop, length), row)
    row = _list_new(length, max(begin, length), stop, keys, k_token, k_head, values, v_token, v_head, row)
    _clear_parameters(to, parameters + (row - table) // _ROW * _PARAMETERS_ROW)
    return row


@kernel
def list_parts(
    layers,
    count,
    queries,
    new,
    keys,
    k_sequence,
    k_token,
    k_head,
    values,
    v_sequence,
    v_token,
    v_head,
    new_pages,
    parts,
    sides,
    bounds,
    query_bounds,
    table,
    parameters,
):
    """Write what the last `queries` tokens of each layer see, parted by the pages that they lie in.

    Those of a part see the sink tokens, pages of codes, and the tokens of their own page. The sink tokens go with the
    first page.

    Args:
        layers: Address of the addresses of
        count: so many CodePages.
        queries: Tokens of each whose queries they are.
        new: How many tokens of each are in no ring yet; all of them queries.
        keys: Address of the first new token's first key, and so on as in `paging.list_rings`.
        k_sequence: Likewise.
        k_token: Likewise.
        k_head: Likewise.
        values: Likewise.
        v_sequence: Likewise.
        v_token: Likewise.
        v_head: Likewise.
        new_pages: Address of two integers for each layer: the number of the first page of codes that is in no slot
            yet, and the address of the addresses of those pages; 0 where there are none.
        parts: How many there are.
        sides: Address of `Visibility.rows`, a sequence for each part.
        bounds: Address of `KVRuns.bounds`.
        query_bounds: Address of the parts' bounds among all queries.
        table: Address of `KVRuns.table`; a part takes a row for each of its layer's slots and sink slots, and three
            more at most.
        parameters: Address of `Codes.parameters`.

    Returns:
        The number of rows.
    """
    row, part, query = table, 0, 0
    store_int(bounds, 0)
    store_int(query_bounds, 0)
    for n in range(count):
        codes = _code_pages_at(load_int(layers + 8 * n))
        ring = ring_at(codes.ring)
        k, v = keys + n * k_sequence, values + n * v_sequence
        first_new, addresses = load_int(new_pages + 16 * n), load_int(new_pages + 16 * n + 8)
        stop = ring.length + new
        start = stop - queries
        while start < stop:
            own = max(start - ring.sink_tokens, 0) // ring.page_size
            behind = min(ring.sink_tokens + (own + 1) * ring.page_size, stop)
            store_int(sides + 8 * part, start)
            store_int(sides + 8 * (parts + part), codes.window - 1)
            store_int(sides + 8 * (2 * parts + part), 0)
            store_int(sides + 8 * (3 * parts + part), ring.sink_tokens)
            to = parameters + (row - table) // _ROW * _PARAMETERS_ROW
            row = _list_part(
                codes, start, behind, own, k, k_token, k_head, v, v_token, v_head, first_new, addresses, row, to
            )
            query += behind - start
            part += 1
            store_int(bounds + 8 * part, (row - table) // _ROW)
            store_int(query_bounds + 8 * part, query)
            start = behind
    return (row - table) // _ROW
