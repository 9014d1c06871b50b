"""Keys and values of many sequences, back to back, in a padded cache or in pages, as runs that are read in place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cpu import UNBOUNDED, KVRuns, Visibility
from ..cpu.runs import COUNT, K_ADDRESS, K_TOKEN_STRIDE, RUN_FIELDS, START, V_ADDRESS
from .arguments import Window

__all__ = ["PAGE_MULTIPLE", "check_pages", "join_runs", "page_runs", "sequence_runs", "visibility"]

# flash-attn 2.8.3 takes pages of a multiple of that many tokens.
PAGE_MULTIPLE = 256

# The sequence that each run belongs to, and the runs: rows of `KVRuns.table`.
OwnedRuns = tuple[NDArray[np.int64], NDArray[np.int64]]


def sequence_runs(
    k: NDArray[Any],
    v: NDArray[Any],
    k_start: NDArray[np.int64],
    v_start: NDArray[np.int64],
    position: NDArray[np.int64],
    count: NDArray[np.int64],
) -> OwnedRuns:
    """One run for each sequence.

    Args:
        k: (..., tokens, heads, head_dim).
        v: As k.
        k_start: Bytes from k's start to each sequence's first key.
        v_start: As k_start, for v.
        position: Position of each sequence's first token.
        count: Tokens of each.
    """
    table = _rows(len(count), k, v)
    table[:, K_ADDRESS] = k_start + k.ctypes.data
    table[:, V_ADDRESS] = v_start + v.ctypes.data
    table[:, START] = position
    table[:, COUNT] = count
    return np.arange(len(count)), table


def page_runs(
    k: NDArray[Any], v: NDArray[Any], block_table: NDArray[np.int64], lengths: NDArray[np.int64]
) -> OwnedRuns:
    """One run for each page of the first `lengths` tokens; k and v are (pages, page_size, heads, head_dim)."""
    page_size = k.shape[1]
    pages = -(-lengths // page_size)
    owner = np.repeat(np.arange(len(lengths)), pages)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(pages) - pages, pages)
    page = block_table[owner, number]
    table = _rows(len(owner), k, v)
    table[:, K_ADDRESS] = page * k.strides[0] + k.ctypes.data
    table[:, V_ADDRESS] = page * v.strides[0] + v.ctypes.data
    table[:, START] = number * page_size
    table[:, COUNT] = np.minimum(lengths[owner] - number * page_size, page_size)
    return owner, table


def join_runs(parts: list[OwnedRuns], sequences: int, k: NDArray[Any], v: NDArray[Any]) -> KVRuns:
    """Put each sequence's runs side by side, in the order of the parts; each part is in order of the sequences."""
    owner, table = parts[0]
    if len(parts) > 1:
        owner, table = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = np.argsort(owner, kind="stable")
        owner, table = owner[order], table[order]
    return KVRuns(
        table=table,
        bounds=owner.searchsorted(np.arange(sequences + 1)),
        dtype=k.dtype,
        kv_heads=k.shape[-2],
        head_dim=k.shape[-1],
        value_dim=v.shape[-1],
    )


def check_pages(
    k: NDArray[Any], v: NDArray[Any], block_table: NDArray[np.int64], lengths: NDArray[np.int64], names: tuple[str, str]
) -> None:
    """Raise ValueError unless the pages have a size that flash-attn takes, and the table names existing ones."""
    pages, page_size = k.shape[:2]
    if v.shape != k.shape:
        raise ValueError(f"{names[1]} must have {names[0]}'s shape {k.shape}, got {v.shape}")
    if page_size % PAGE_MULTIPLE or not page_size:
        raise ValueError(f"{names[0]} must have pages of a multiple of {PAGE_MULTIPLE} tokens, got {page_size}")
    needed = -(-lengths // page_size)
    if int(needed.max()) > block_table.shape[1]:
        raise ValueError(
            f"block_table must have {int(needed.max())} pages a sequence for {int(lengths.max())} tokens, "
            f"got {block_table.shape[1]}"
        )
    used = block_table[np.arange(block_table.shape[1]) < needed[:, None]]
    if used.size and not 0 <= int(used.min()) <= int(used.max()) < pages:
        raise ValueError(f"block_table must name pages 0 to {pages - 1}, got {int(used.min())} to {int(used.max())}")


def visibility(q_tokens: NDArray[np.int64] | int, kv_tokens: NDArray[np.int64], window: Window) -> Visibility:
    """Bottom-right alignment: the last query of a sequence stands where its last key does."""
    left, right = (UNBOUNDED if side is None else side for side in window)
    return Visibility(kv_tokens - q_tokens, left, right, sinks=0)


def _rows(count: int, k: NDArray[Any], v: NDArray[Any]) -> NDArray[np.int64]:
    """Runs of tokens that lie as those of k and v do; where, and which, is still to be filled in."""
    table = np.empty((count, RUN_FIELDS), np.int64)
    table[:, K_TOKEN_STRIDE:] = *k.strides[-3:-1], *v.strides[-3:-1]
    return table
