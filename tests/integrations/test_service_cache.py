"""A model whose attention and KV memory live in a service generates what it generates in process."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
import torch
import transformers
from running_server import RunningServer

from numbaflash.integrations.transformers import RingCache, ServiceCache, register
from numbaflash_service import Client, ServiceError, Session

register()


@pytest.fixture
def target() -> Iterator[str]:
    """A server that nobody else has left a session on."""
    server = RunningServer()
    yield server.target
    server.stop()


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
        with pytest.raises(ValueError, match="tokens_to_remove must be -25 to 0, got 3"):
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


def three_sequences(padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(3, 40, dtype=torch.long)
    if padded:
        mask[1, :6] = mask[2, :9] = 0
    return torch.randint(2, 128, (3, 40), generator=torch.Generator().manual_seed(2)) * mask, mask


@torch.no_grad()
def go_on(llama: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The logits of the tokens that the cache has not seen."""
    seen = cache.get_seq_length()
    logits: torch.Tensor = llama(
        ids[:, seen:], attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)[:, seen:], cache=cache
    ).logits
    return logits


@contextmanager
def one_fails(name: str, call: int, taken: bool) -> Iterator[None]:
    """One call of a method of sessions fails, by its number; the server has taken it, or not."""
    method, calls = getattr(Session, name), []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if taken or len(calls) != call:
            answer = method(*arguments, **options)
        if len(calls) == call:
            raise ServiceError("lost on the way", code=grpc.StatusCode.UNAVAILABLE)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, name, failing)
        with pytest.raises(ServiceError, match="lost on the way"):
            yield


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("taken", [False, True], ids=["not taken", "answer lost"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("held", [0, 39], ids=["prompt", "token"])
def test_a_step_that_fails_for_the_second_of_three_sequences_is_taken_by_none(
    llama: Any, target: str, held: int, layer: int, taken: bool, padded: bool
) -> None:
    ids, mask = three_sequences(padded)
    with Client(target) as client:
        cache, plain = (ServiceCache(client, capacity=32, sink_tokens=2, rollback=1) for _ in range(2))
        if held:
            for each in (cache, plain):
                go_on(llama, each, ids[:, :held], mask[:, :held])
        with one_fails("step", 3 * layer + 2, taken):
            go_on(llama, cache, ids, mask)
        assert [cache.get_seq_length(layer) for layer in range(2)] == [held, held]
        assert torch.equal(*(go_on(llama, each, ids, mask) for each in (cache, plain)))
        lengths = mask.sum(1).tolist()
        assert [(info.min_length, info.max_length) for info in client.list_sessions()] == [(n, n) for n in lengths] * 2


@pytest.mark.parametrize("taken", [False, True], ids=["not taken", "answer lost"])
def test_a_failed_step_is_taken_back_when_the_service_is_there_again(llama: Any, target: str, taken: bool) -> None:
    ids, mask = three_sequences(padded=True)
    with Client(target) as client:
        cache, plain = ServiceCache(client), ServiceCache(client)
        for each in (cache, plain):
            go_on(llama, each, ids[:, :30], mask[:, :30])
        with one_fails("step", 2, taken):
            go_on(llama, cache, ids, mask)
        with one_fails("truncate", 2, taken):
            go_on(llama, cache, ids, mask)
        with one_fails("step", 5, taken):
            go_on(llama, cache, ids, mask)
        for each in (cache, plain):
            each.crop(-2)
        assert torch.equal(*(go_on(llama, each, ids, mask) for each in (cache, plain)))


def test_a_failed_step_that_cannot_be_taken_back_asks_for_a_reset(llama: Any, target: str) -> None:
    ids, mask = three_sequences(padded=False)
    with Client(target) as client:
        cache = ServiceCache(client, capacity=16, rollback=4)
        go_on(llama, cache, ids[:, :20], mask[:, :20])
        with one_fails("step", 2, taken=False):
            go_on(llama, cache, ids, mask)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"the model failed .* reset\(\) the cache .*would have holes"):
                go_on(llama, cache, ids, mask)
        cache.reset()
        again, plain = (go_on(llama, each, ids, mask) for each in (cache, RingCache(16, rollback=4)))
        assert torch.equal(again, plain)


@pytest.mark.parametrize("taken", [False, True], ids=["not taken", "answer lost"])
def test_tokens_are_taken_back_from_all_sequences_where_the_service_fails_for_the_second(
    llama: Any, target: str, taken: bool
) -> None:
    ids, mask = three_sequences(padded=True)
    with Client(target) as client:
        cache, plain = (ServiceCache(client, capacity=24) for _ in range(2))
        for each, tokens in ((cache, 40), (plain, 35)):
            go_on(llama, each, ids[:, :tokens], mask[:, :tokens])
        cache.crop(-5)
        with one_fails("truncate", 2, taken):
            go_on(llama, cache, ids, mask)
        assert cache.get_seq_length() == 35
        assert torch.equal(*(go_on(llama, each, ids, mask) for each in (cache, plain)))


def test_copies_of_a_cache_share_its_prompt(llama: Any, target: str) -> None:
    ids, mask = three_sequences(padded=True)
    with Client(target) as client:
        cache, plain = ServiceCache(client), RingCache(256)
        for each in (cache, plain):
            go_on(llama, each, ids[:, :38], mask[:, :38])
        twin = copy.deepcopy(cache)
        assert len(client.list_sessions()) == 6
        expected = go_on(llama, plain, ids, mask)
        assert all(torch.equal(go_on(llama, each, ids, mask), expected) for each in (twin, cache))


def made_by(kind: str, client: Client) -> tuple[Any, Any]:
    """Two caches of a kind, of 12 tokens, any 4 of which can be taken back."""
    if kind == "service":
        return ServiceCache(client, capacity=12, rollback=4), ServiceCache(client, capacity=12, rollback=4)
    return RingCache(12, rollback=4), RingCache(12, rollback=4)


@pytest.mark.parametrize("kind", ["service", "in process"])
@pytest.mark.parametrize(
    ("tokens_to_remove", "message"),
    [(-5, "at most 4 tokens .* below the 24 that the cache has seen; got -5 of 24"), (-16, "must be -15 to 0")],
    ids=["overwritten", "padding"],
)
def test_tokens_that_not_all_sequences_can_give_back_stay_in_all(
    llama: Any, target: str, kind: str, tokens_to_remove: int, message: str
) -> None:
    ids, mask = (tensor.flip(0) for tensor in three_sequences(padded=True))  # the first has 15 tokens: all are there
    with Client(target) as client:
        cache, plain = made_by(kind, client)
        for each in (cache, plain):
            go_on(llama, each, ids[:, :24], mask[:, :24])
        with pytest.raises(ValueError, match=message):
            cache.crop(tokens_to_remove)
        assert cache.get_seq_length() == 24
        assert torch.equal(*(go_on(llama, each, ids, mask) for each in (cache, plain)))


@contextmanager
def breaks_off(llama: Any, module: str, call: int = 1) -> Iterator[None]:
    """The user presses Ctrl-C when a module of the model is called for the n-th time."""
    calls = itertools.count(1)

    def press(*_: Any) -> None:
        if next(calls) == call:
            raise KeyboardInterrupt

    hook = llama.get_submodule(module).register_forward_pre_hook(press)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        hook.remove()


@pytest.mark.parametrize("kind", ["service", "in process"])
@pytest.mark.parametrize("held", [0, 36], ids=["prompt", "tokens"])
@pytest.mark.parametrize("module", ["model.layers.0.mlp", "model.layers.1.self_attn.o_proj", "lm_head"])
def test_a_call_of_the_model_that_fails_outside_of_the_cache_can_be_taken_back_and_made_again(
    llama: Any, target: str, kind: str, held: int, module: str
) -> None:
    ids, mask = three_sequences(padded=True)
    with Client(target) as client:
        cache, plain = made_by(kind, client)
        if held:
            for each in (cache, plain):
                go_on(llama, each, ids[:, :held], mask[:, :held])
        with breaks_off(llama, module):
            go_on(llama, cache, ids, mask)
        # Behind the last attention all layers have moved, before it none has.
        assert cache.get_seq_length() == (held if module == "model.layers.0.mlp" else 40)
        cache.crop(held - cache.get_seq_length())
        assert cache.get_seq_length() == held
        assert torch.equal(*(go_on(llama, each, ids, mask) for each in (cache, plain)))


@pytest.mark.parametrize("kind", ["service", "in process"])
@pytest.mark.parametrize("module", ["model.layers.1.self_attn.q_proj", "lm_head"])
def test_generation_that_was_broken_off_goes_on(llama: Any, target: str, kind: str, module: str) -> None:
    prompt = left_padded()["input_ids"][:1]
    said: list[int] = []

    class Listener:
        def put(self, tokens: torch.Tensor) -> None:
            said.extend(tokens.flatten().tolist())

        def end(self) -> None:
            pass

    with Client(target) as client:
        cache, plain = made_by(kind, client)
        expected = llama.generate(prompt, cache=plain, max_new_tokens=20, do_sample=False)
        with breaks_off(llama, module, call=12):
            llama.generate(prompt, cache=cache, max_new_tokens=20, do_sample=False, streamer=Listener())
        so_far = torch.tensor([said])
        assert so_far.shape == (1, 30 + 11)
        cache.crop(so_far.shape[1] - 1 - cache.get_seq_length())
        again = llama.generate(so_far, cache=cache, max_new_tokens=20 - 11, do_sample=False)
    assert cache.get_seq_length() == plain.get_seq_length() == 49  # the last token has not been given to the model
    assert torch.equal(again, expected)
