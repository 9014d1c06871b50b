"""A model whose attention and KV memory live in a service generates what it generates in process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from numbaflash.integrations.transformers import RingCache, ServiceCache, register
from numbaflash_service import Client
from numbaflash_service.config import load
from numbaflash_service.server import Server

register()


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """A server on a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> Server:
        server = Server(load(listen=["127.0.0.1:0"], grace=2.0))
        await server.start()
        return server

    server = asyncio.run_coroutine_threadsafe(start(), loop).result(timeout=300)
    yield server.addresses[0]
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result(timeout=30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        eos_token_id=None,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation="numbaflash").eval()


def left_padded() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :10] = 0
    ids = torch.randint(2, 128, (2, 30), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids * mask, "attention_mask": mask}


def test_generation_over_the_wire_is_that_in_process(llama: Any, target: str) -> None:
    options = {"max_new_tokens": 30, "do_sample": False}
    with Client(target) as client:
        cache = ServiceCache(client, capacity=24, sink_tokens=2)
        out = llama.generate(**left_padded(), cache=cache, **options)
        assert [session.num_kv_heads for session in client.list_sessions()] == [2, 2]  # one for each sequence
        cache.close()
        assert client.list_sessions() == []
    assert torch.equal(out, llama.generate(**left_padded(), cache=RingCache(24, sink_tokens=2), **options))


def test_without_a_capacity_the_whole_context_stays_visible(llama: Any, target: str) -> None:
    options = {"max_new_tokens": 30, "do_sample": False}
    with Client(target) as client:
        out = llama.generate(**left_padded(), cache=ServiceCache(client), **options)
    assert torch.equal(out, llama.generate(**left_padded(), **options))


def test_beams_fork_sessions_and_end_those_that_lost(llama: Any, target: str) -> None:
    options = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False}
    with Client(target) as client:
        cache = ServiceCache(client, capacity=64)
        out = llama.generate(**left_padded(), cache=cache, **options)
        assert len(client.list_sessions()) == 6
        cache.close()
        assert client.list_sessions() == []
    assert torch.equal(out, llama.generate(**left_padded(), cache=RingCache(64), **options))


def test_tokens_taken_back_are_forgotten(llama: Any, target: str) -> None:
    ids = left_padded()["input_ids"]
    with Client(target) as client, torch.no_grad():
        cropped, plain = ServiceCache(client), RingCache(256)
        llama(ids, cache=cropped)
        llama(ids[:, :20], cache=plain)
        cropped.crop(-10)
        assert cropped.get_seq_length() == 20
        logits = [llama(ids[:, 25:], cache=cache).logits for cache in (cropped, plain)]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="tokens_to_remove must be 0 or negative"):
            cropped.crop(3)


def test_another_batch_than_the_caches_is_refused(llama: Any, target: str) -> None:
    with Client(target) as client, torch.no_grad():
        cache = ServiceCache(client)
        llama(**left_padded(), cache=cache)
        with pytest.raises(ValueError, match="the cache holds 2 sequences, got a batch of 1"):
            llama(left_padded()["input_ids"][:1], cache=cache)
        cache.reset()
        assert client.list_sessions() == []


def test_a_session_that_cannot_be_made_leaves_none_behind(llama: Any, target: str) -> None:
    class Grudging(Client):
        def create_session(self, *args: Any, **options: Any) -> Any:
            if self.list_sessions():
                raise RuntimeError("one is enough")
            return super().create_session(*args, **options)

    with Grudging(target) as client, torch.no_grad():
        with pytest.raises(RuntimeError, match="one is enough"):
            llama(**left_padded(), cache=ServiceCache(client))
        assert client.list_sessions() == []
