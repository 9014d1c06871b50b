"""Between padded batches and packed ones: `unpad_input` and `pad_input`, flash-attn's `bert_padding`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import as_numpy, like

__all__ = ["pad_input", "unpad_input"]


def unpad_input(hidden_states: Any, attention_mask: Any, unused_mask: Any = None) -> tuple[Any, Any, Any, int, Any]:
    """Take the valid tokens out of a padded batch; torch tensors keep their gradients.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or int; 1 means valid.
        unused_mask: (batch, seqlen), bool or int; 1 means allocated but not used.

    Returns:
        The tokens of either mask (total, ...); their indices in the flattened batch, int64 (total,); the cumulative
        sequence lengths, int32 (batch + 1,); the longest length; and the valid tokens of each sequence, int32 (batch,).

    Raises:
        ValueError: The masks do not have hidden_states' batch and tokens.
    """
    masks = {"attention_mask": attention_mask} | ({} if unused_mask is None else {"unused_mask": unused_mask})
    set_in = {name: as_numpy(mask, name) != 0 for name, mask in masks.items()}
    for name, mask in set_in.items():
        if mask.ndim != 2 or tuple(hidden_states.shape[:2]) != mask.shape:
            raise ValueError(
                f"{name} must have hidden_states' batch and tokens {tuple(hidden_states.shape[:2])}, "
                f"got shape {mask.shape}"
            )
    valid = set_in["attention_mask"]
    taken = np.logical_or.reduce(list(set_in.values()))
    lengths = taken.sum(axis=1, dtype=np.int32)
    bounds = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    indices = like(attention_mask, np.flatnonzero(taken))
    flat = hidden_states.reshape(-1, *hidden_states.shape[2:])
    used = valid.sum(axis=1, dtype=np.int32)
    longest = int(lengths.max(initial=0))
    return flat[indices], indices, like(attention_mask, bounds), longest, like(attention_mask, used)


def pad_input(hidden_states: Any, indices: Any, batch: int, seqlen: int) -> Any:
    """Put tokens back to their places in a padded batch, zeros elsewhere; torch tensors keep their gradients.

    Args:
        hidden_states: (total, ...).
        indices: (total,): the tokens' indices in the flattened batch, from `unpad_input`.
        batch: Sequences.
        seqlen: Tokens of each in the padded batch.

    Returns:
        (batch, seqlen, ...), the library and dtype of hidden_states.
    """
    shape = (batch * seqlen, *hidden_states.shape[1:])
    padded = (
        np.zeros(shape, hidden_states.dtype)
        if isinstance(hidden_states, np.ndarray)
        else (hidden_states.new_zeros(shape))
    )
    padded[indices] = hidden_states
    return padded.reshape(batch, seqlen, *hidden_states.shape[1:])
