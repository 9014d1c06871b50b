"""One call, as the kernels see it: a record of addresses, strides and options that all threads share."""

from __future__ import annotations

from .jit import native
from .record import Record, record_at
from .vector import atomic_add, atomic_load

__all__ = ["ITEMS_DONE", "NEXT_ITEM", "NO_BIAS", "Task", "next_item", "report_item", "take_item", "task_at"]

# What bias_dtype says beside the codes of the dtypes.
NO_BIAS = -1

# Addresses and strides are in bytes; an address of 0 means that the call has no such array.
_INTEGERS = (
    # The work: items are taken by adding to next_item, and reported by adding to items_done.
    *("next_item", "items_done", "items", "rows_per_item", "heads_per_item", "splits"),
    "kv_tokens",  # of all runs
    *("sequences", "q_tokens", "q_heads", "kv_heads", "group", "head_dim", "value_dim", "q_dtype", "kv_dtype"),
    *("out_batch", "out_token", "out_head", "lse_batch", "lse_head", "lse_token"),
    # Where the call's arrays lie, and what the addresses in runs count from: 0, or the first key and the first value.
    *("q", "k_base", "v_base", "out", "lse"),
    # Where KVRuns and Visibility lie.
    *("q_batch", "q_token", "q_head", "runs", "bounds", "q_start", "left", "right", "sinks"),
    # Where sequences have different numbers of tokens, and lie one behind the other (q_batch is 0 then).
    "q_bounds",
    # Codes.
    *("codes", "code_bits", "key_group", "value_group", "symmetric", "page_size"),
    # Scoring.
    *("alibi_slopes", "sink_logits"),
    *("bias", "bias_batch", "bias_head", "bias_row", "bias_key", "bias_dtype"),
    # What an algorithm keeps between items, in its own layout; and, in decode, how many splits of a unit are done.
    *("workspace", "splits_done"),
    # For helpers: the address of the kernel, and the memory that it wants for each thread.
    *("entry", "scratch_bytes"),
)


class Task(Record, integers=_INTEGERS, floats=("scale", "softcap")):
    """What one call is to do, and how far it is."""

    def starting_at(self, item: int) -> Task:
        """Return a copy whose items before that one are done.

        A thread that wakes up late for this task must find its counter, so it is not set back.
        """
        twin = self.copy()
        twin["next_item"] = twin["items_done"] = item
        return twin


task_at = record_at(Task.dtype)
NEXT_ITEM, ITEMS_DONE = Task.offset_of("next_item"), Task.offset_of("items_done")


@native
def take_item(task_address):
    """The number of a work item that nobody has taken; `items` or more where there is none left."""
    return atomic_add(task_address + NEXT_ITEM, 1)


@native
def next_item(task_address):
    """The number of the item that will be taken next."""
    return atomic_load(task_address + NEXT_ITEM)


@native
def report_item(task_address):
    """Tell that a work item is done, and what it wrote can be read."""
    atomic_add(task_address + ITEMS_DONE, 1)
