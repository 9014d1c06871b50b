"""The work items of decode: which keys of which heads each of them has.

An item is one split of the keys, positions s * SPLIT_KEYS to (s + 1) * SPLIT_KEYS, of one KV head; or of several, where
the heads of a token lie side by side: memory gives long pieces faster than short ones. All rows (tokens x query heads
of the group) of a head go through it together. How many heads share an item depends on the number of threads, what
comes of a head does not.
"""

from __future__ import annotations

from typing import NamedTuple

from .jit import native
from .panel import query_position, query_rows
from .runs import COUNT, K_HEAD_STRIDE, K_TOKEN_STRIDE, START, V_HEAD_STRIDE, V_TOKEN_STRIDE
from .task import next_item
from .vector import load_int
from .walk import key_at, run_field, runs_end, skip_runs

__all__ = ["MAX_ROWS", "SPLIT_KEYS", "Item", "item_at", "plan_items", "splits_of", "unit_of", "untaken_keys"]

# Keys of a split: enough that merging costs nothing beside reading them, few enough that one KV head of a 4096 token
# sequence still makes 8 items.
SPLIT_KEYS = 512
MAX_ROWS = 64  # of an item

# Heads of an item, and how many items there must be for each thread. On two AVX-512 cores, a 32-head token of 8 KiB is
# read with 24 GB/s head by head, 30 by eights and 34 by sixteens.
_MAX_HEADS = 16
_ITEMS_PER_THREAD = 4


class Item(NamedTuple):
    """Query rows `row` to `row + rows` of `heads` KV heads from `kv_head` on, and `keys` keys from `begin` on.

    In scratch memory a head has `padded_rows`, one or an even number, as the micro-kernels take them.
    """

    sequence: int
    kv_head: int
    heads: int
    row: int
    rows: int
    padded_rows: int
    begin: int
    keys: int


@native
def _key_range(task, sequence):
    """Positions that any query of a sequence may see: (first behind the sinks, end)."""
    first = max(load_int(task.q_start + 8 * sequence) - load_int(task.left + 8 * sequence), 0)
    last_query = query_position(task, sequence, query_rows(task, sequence) - 1)
    return first, min(last_query + load_int(task.right + 8 * sequence) + 1, runs_end(task, sequence))


@native
def _count_splits(task, sequence):
    """Splits that hold sink tokens, the first split of the window, and the number of both together (at least 1)."""
    first, end = _key_range(task, sequence)
    sinks = max(min(load_int(task.sinks + 8 * sequence), end), 0)
    sink_splits = (sinks + SPLIT_KEYS - 1) // SPLIT_KEYS
    window = max(first // SPLIT_KEYS, sink_splits)
    return sink_splits, window, max(sink_splits + max((end + SPLIT_KEYS - 1) // SPLIT_KEYS - window, 0), 1)


@native
def splits_of(task, sequence):
    """Splits of a sequence's heads."""
    return _count_splits(task, sequence)[2]


@native
def _split_number(task, sequence, split):
    """Which SPLIT_KEYS positions of a sequence are its n-th split."""
    sink_splits, window, _ = _count_splits(task, sequence)
    return split if split < sink_splits else window + split - sink_splits


@native
def _blocks(task):
    """Blocks of `rows_per_item` rows that a KV head has."""
    return (task.q_tokens * task.group + task.rows_per_item - 1) // task.rows_per_item


@native
def _head_blocks(task):
    return (task.kv_heads + task.heads_per_item - 1) // task.heads_per_item


@native
def _locate(task, number):
    """The split, sequence, first KV head and first row of an item."""
    blocks, head_blocks = _blocks(task), _head_blocks(task)
    # Heads before splits: where the heads of a token lie side by side, they are read one after the other.
    split, rest = number // (task.sequences * head_blocks * blocks), number % (task.sequences * head_blocks * blocks)
    pair, row = rest // blocks, rest % blocks * task.rows_per_item
    return split, pair // head_blocks, pair % head_blocks * task.heads_per_item, row


@native
def _padded_rows(rows):
    return rows if rows == 1 else (rows + 1) // 2 * 2


@native
def plan_items(task, threads):
    """Fill in items, rows_per_item, heads_per_item, splits and kv_tokens."""
    rows = task.q_tokens * task.group
    task.kv_tokens = 0
    for run in range(load_int(task.bounds), load_int(task.bounds + 8 * task.sequences)):
        task.kv_tokens += run_field(task, run, COUNT)
    splits = 1
    for sequence in range(task.sequences):
        splits = max(splits, splits_of(task, sequence))
    task.splits = splits
    task.rows_per_item = min(rows, MAX_ROWS)
    per_head_block = task.sequences * _blocks(task) * splits
    task.heads_per_item = 1
    if _are_heads_side_by_side(task):
        task.heads_per_item = max(min(task.kv_heads, _MAX_HEADS, MAX_ROWS // _padded_rows(rows)), 1)
        while task.heads_per_item > 1 and _head_blocks(task) * per_head_block < _ITEMS_PER_THREAD * threads:
            task.heads_per_item = (task.heads_per_item + 1) // 2
    task.items = _head_blocks(task) * per_head_block


@native
def _are_heads_side_by_side(task):
    """Whether a token's heads lie closer together than a head's tokens; quantized ones never do."""
    run = load_int(task.bounds)
    if task.codes != 0 or run == load_int(task.bounds + 8 * task.sequences):
        return False
    keys = run_field(task, run, K_HEAD_STRIDE) < run_field(task, run, K_TOKEN_STRIDE)
    return keys and run_field(task, run, V_HEAD_STRIDE) < run_field(task, run, V_TOKEN_STRIDE)


@native
def item_at(task, number):
    """Which split of its sequence an item is, and the item; it has no rows where there is no such split or row."""
    split, sequence, kv_head, row = _locate(task, number)
    rows = max(min(task.rows_per_item, query_rows(task, sequence) - row), 0)
    if split >= splits_of(task, sequence):
        rows = 0
    first, end = _key_range(task, sequence)
    begin = _split_number(task, sequence, split) * SPLIT_KEYS
    end = min(end, begin + SPLIT_KEYS)
    if begin >= load_int(task.sinks + 8 * sequence):
        begin = max(begin, first)
    heads = min(task.heads_per_item, task.kv_heads - kv_head)
    return split, Item(sequence, kv_head, heads, row, rows, _padded_rows(rows), begin, max(end - begin, 0))


@native
def unit_of(task, item, head):
    """A number for the rows of an item's n-th head, the same in all splits."""
    return (item.sequence * task.kv_heads + item.kv_head + head) * _blocks(task) + item.row // task.rows_per_item


@native
def untaken_keys(task, task_address):
    """Where the first keys lie of the next item that nobody has taken; 0 where there is none."""
    number = next_item(task_address)
    if number >= task.items:
        return 0
    split, sequence, kv_head, _ = _locate(task, number)
    position = _split_number(task, sequence, split) * SPLIT_KEYS
    run = skip_runs(task, sequence, load_int(task.bounds + 8 * sequence), position)
    if run >= load_int(task.bounds + 8 * sequence + 8):
        return 0
    return key_at(task, run, kv_head, max(position, run_field(task, run, START)))
