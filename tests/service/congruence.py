"""A session and a cache in process: what is called on both, and that they give the same."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from hypothesis import strategies as st

import numbaflash
from numbaflash_service import Client, wire

CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "layer": st.integers(0, 1),
            "tokens": st.one_of(st.just(1), st.integers(0, 12), st.integers(13, 90)),
            "method": st.sampled_from(
                ["step", "step", "prefill", "decode", "append", "append and attend", "truncate", "fork"]
            ),
            "options": st.fixed_dictionaries(
                {},
                optional={
                    "scale": st.sampled_from([0.125, 0.3]),
                    "softcap": st.sampled_from([0.0, 4.0]),
                    "alibi_slopes": st.just(np.array([0.5, 0.25, 0.125, 0.0625], np.float32)),
                    "sink_logits": st.just(np.array([0.0, 1.0, -1.0, -np.inf], np.float32)),
                },
            ),
        }
    ),
    min_size=1,
    max_size=6,
)

RINGS = {
    "calls": CALLS,
    "capacity": st.sampled_from([5, 33, 64]),
    "sink_tokens": st.integers(0, 4),
    "page_size": st.sampled_from([8, 64]),
    "stream": st.booleans(),
}
DEVICE_STORAGE = st.sampled_from(["float32", "int8"])


def check_that_a_session_is_a_cache(
    client: Client,
    backend: str,
    calls: list[dict[str, Any]],
    capacity: int,
    sink_tokens: int,
    page_size: int,
    storage: str,
    dtype: str,
    stream: bool,
) -> None:
    shape = {"capacity": capacity, "sink_tokens": sink_tokens, "dtype": storage, "page_size": page_size}
    cache = numbaflash.RingKVCache(2, 2, 32, **shape, backend=backend)
    rng = np.random.default_rng(0)
    with contextlib.ExitStack() as forks:
        session = forks.enter_context(client.create_session(2, 2, 32, **shape, stream=stream))
        for call in calls:
            layer, tokens, options = call["layer"], call["tokens"], call["options"]
            q, k, v = (rng.standard_normal((tokens, heads, 32)).astype(wire.DTYPES[dtype]) for heads in (4, 2, 2))
            if call["method"] == "truncate":
                length = max(0, max(cache.length(0), cache.length(1)) - tokens)
                outcomes = [truncation(form, length) for form in (session, cache)]
                assert outcomes[0] == outcomes[1]
            elif call["method"] == "fork":
                session, cache = forks.enter_context(session.fork()), cache.fork()
            elif call["method"] == "append":
                assert session.append(layer, k, v) is cache.append(layer, k, v) is None
            elif call["method"] == "append and attend":
                last = min(tokens, 20)
                for form in (session, cache):
                    form.append(layer, k, v)
                compare(session, cache, layer, lambda f: f.attend(layer, q[:last], **options))  # noqa: B023 - at once
            else:
                over_wire = getattr(session, call["method"])(layer, q, k, v, **options)
                in_process = cache.step(layer, q, k, v, **options)
                assert over_wire.dtype == in_process.dtype
                assert over_wire.tobytes() == in_process.tobytes()
            assert [session.length(i) for i in range(2)] == [cache.length(i) for i in range(2)]
            assert [session.first(i) for i in range(2)] == [cache.first(i) for i in range(2)]


def truncation(form: Any, length: int) -> bool:
    """Say whether a form can be truncated; it is, then."""
    try:
        form.truncate(length)
    except ValueError:
        return False
    return True


def compare(session: Any, cache: Any, layer: int, call: Any) -> None:
    assert call(session).tobytes() == call(cache).tobytes()
    assert session.length(layer) == cache.length(layer)
