"""Pages of codes, compiled: what the queries of one page see of a quantized layer, as rows of run tables."""

from __future__ import annotations

from .jit import kernel, native
from .paging import list_stretches, ring_at, store_run
from .record import Record, record_at
from .runs import RUN_FIELDS
from .vector import load_int, store_int

__all__ = ["CodePages", "list_seen_runs"]

_ROW = 8 * RUN_FIELDS
_PARAMETERS_ROW = 8 * 2


class CodePages(Record, integers=("pages", "slots", "row_bytes", "key_head", "value_head", "values", "parameters")):
    """A layer's pages of codes, as the function below sees them; see `cache.page_format.PageFormat`.

    `pages` is the address of the page table: for each of the slots, the address of its page. From there it is `values`
    bytes to the first head's values, and from a head's codes `parameters` bytes to their scales.
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


@kernel
def list_seen_runs(
    ring_address,
    codes_address,
    first,
    own,
    new_page,
    new_pages,
    length,
    stop,
    keys,
    k_token,
    k_head,
    values,
    v_token,
    v_head,
    table,
    parameters,
):
    """Write what queries in the page `own`, up to the position `stop`, see, as rows of both tables.

    That is the sink tokens, the pages of codes from `first` on, and the tokens of their own page.

    Args:
        ring_address: RingRecord of the tokens that are no codes.
        codes_address: CodePages.
        first: The oldest page of codes, by its number behind the sink tokens.
        own: The page of the queries.
        new_page: Pages of that number and above are no slot's yet, but
        new_pages: lie at the addresses at this address.
        length: Tokens that the layer holds; those behind it are new ones.
        stop: Position behind the last query.
        keys: Address of the first new token's key,
        k_token: stride of tokens, in bytes,
        k_head: and of heads.
        values: Of the first new token's value,
        v_token: stride of tokens,
        v_head: and of heads.
        table: Address of `KVRuns.table`.
        parameters: Address of `Codes.parameters`.

    Returns:
        The number of rows: those of the ring's sink slots and of the pages of codes, and three more at most.
    """
    ring, codes = ring_at(ring_address), _code_pages_at(codes_address)
    sinks = min(ring.sink_tokens, stop)
    row = list_stretches(ring, 0, min(sinks, length), table)
    row = _list_new(length, length, sinks, keys, k_token, k_head, values, v_token, v_head, row)
    to = parameters + (row - table) // _ROW * _PARAMETERS_ROW
    _clear_parameters(parameters, to)

    for page in range(first, own):
        address = (
            load_int(new_pages + 8 * (page - new_page))
            if page >= new_page
            else load_int(codes.pages + 8 * (page % codes.slots))
        )
        k, v = address, address + codes.values
        start = ring.sink_tokens + page * ring.page_size
        store_run(row, k, v, start, ring.page_size, codes.row_bytes, codes.key_head, codes.row_bytes, codes.value_head)
        store_int(to, k + codes.parameters)
        store_int(to + 8, v + codes.parameters)
        row += _ROW
        to += _PARAMETERS_ROW

    begin = ring.sink_tokens + own * ring.page_size
    row = list_stretches(ring, begin, min(stop, length), row)
    row = _list_new(length, max(begin, length), stop, keys, k_token, k_head, values, v_token, v_head, row)
    rows = (row - table) // _ROW
    _clear_parameters(to, parameters + rows * _PARAMETERS_ROW)
    return rows
