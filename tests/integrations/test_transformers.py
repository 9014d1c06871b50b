"""transformers' models with attn_implementation="numbaflash", against their own eager attention; weights are random."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

import numbaflash
from numbaflash.cpu import solve
from numbaflash.integrations import caches
from numbaflash.integrations.transformers import RingCache, register

register()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices of 64 columns: torch's threads wait longer for each other than one computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,  # random logits far enough apart that rounding never changes the greedy token
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**TINY),
    "mistral": lambda: transformers.MistralConfig(**TINY, sliding_window=12),
    "gemma2": lambda: transformers.Gemma2Config(
        **TINY, sliding_window=12, attn_logit_softcapping=5.0, query_pre_attn_scalar=16
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **TINY, sliding_window=12, num_local_experts=2, num_experts_per_tok=1, rope_parameters=None
    ),
    "qwen2": lambda: transformers.Qwen2Config(**TINY),
    "qwen3": lambda: transformers.Qwen3Config(**TINY),
}


def models(config: Any, kind: Any = transformers.AutoModelForCausalLM) -> tuple[Any, Any]:
    """The same random weights, with numbaflash and with eager attention."""
    found = []
    for implementation in ("numbaflash", "eager"):
        torch.manual_seed(0)
        found.append(kind.from_config(copy.deepcopy(config), attn_implementation=implementation).eval())
    with torch.no_grad():
        for ours, theirs in zip(found[0].parameters(), found[1].parameters(), strict=True):
            if not torch.isfinite(ours).all():  # some weights are left as they are for a checkpoint to fill
                ours.copy_(torch.randn_like(ours))
            theirs.copy_(ours)
    return found[0], found[1]


def prompts(tokens: int = 30, batch: int = 2) -> torch.Tensor:
    return torch.randint(2, 128, (batch, tokens), generator=torch.Generator().manual_seed(1))


def left_padded(tokens: int = 30) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, tokens, dtype=torch.long)
    mask[1, : tokens // 3] = 0
    return {"input_ids": prompts(tokens) * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
def test_logits_are_those_of_eager_attention(name: str, padded: bool) -> None:
    ours, theirs = models(CONFIGS[name]())
    inputs = left_padded() if padded else {"input_ids": prompts()}
    with torch.no_grad():
        out, expected = ours(**inputs).logits, theirs(**inputs).logits
    seen = inputs["attention_mask"].bool() if padded else torch.ones(2, 30, dtype=torch.bool)
    torch.testing.assert_close(out[seen], expected[seen], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "llama"])
def test_generation_is_that_of_eager_attention(name: str) -> None:
    ours, theirs = models(CONFIGS[name]())
    inputs = left_padded()
    out, expected = (model.generate(**inputs, max_new_tokens=24, do_sample=False) for model in (ours, theirs))
    assert torch.equal(out, expected)


def test_a_llama_generates_200_tokens_as_with_eager_attention() -> None:
    ours, theirs = models(CONFIGS["llama"]())
    inputs = {"input_ids": prompts(batch=1), "attention_mask": torch.ones(1, 30, dtype=torch.long)}
    out, expected = (model.generate(**inputs, max_new_tokens=200, do_sample=False) for model in (ours, theirs))
    assert out.shape == (1, 230)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("implementation", ["static", "sliding"])
def test_other_caches_of_transformers_work(implementation: str) -> None:
    config = CONFIGS["mistral" if implementation == "sliding" else "llama"]()
    ours, theirs = models(config)
    caches = [
        transformers.StaticCache(config, max_cache_len=64)
        if implementation == "static"
        else transformers.DynamicCache(config=config)
        for _ in range(2)
    ]
    ids = prompts(20)
    for piece in (ids[:, :17], ids[:, 17:18], ids[:, 18:]):
        with torch.no_grad():
            out, expected = (
                model(piece, cache=cache).logits for model, cache in zip((ours, theirs), caches, strict=True)
            )
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_encoders_see_both_ways_but_no_padding(name: str) -> None:
    shape = {"vocab_size": 128, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3}
    wide = {**shape, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = {
        "bert": lambda: transformers.BertConfig(**wide),
        "roberta": lambda: transformers.RobertaConfig(**wide),
        "distilbert": lambda: transformers.DistilBertConfig(**shape, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    }[name]()
    ours, theirs = models(config, transformers.AutoModel)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 13:] = 0
    for inputs in ({"input_ids": prompts(20)}, {"input_ids": prompts(20), "attention_mask": mask}):
        with torch.no_grad():
            out, expected = (model(**inputs).last_hidden_state for model in (ours, theirs))
        seen = inputs.get("attention_mask", torch.ones_like(mask)).bool()
        torch.testing.assert_close(out[seen], expected[seen], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_computes_with_numbaflash(name: str, monkeypatch: pytest.MonkeyPatch) -> None:

    calls = []
    run = solve.run
    monkeypatch.setattr(solve, "run", lambda *args: calls.append(1) or run(*args))
    ours, _ = models(CONFIGS[name]())
    with torch.no_grad():
        ours(prompts())
    assert len(calls) == 2  # one for each layer


def test_a_long_causal_prompt_makes_no_mask() -> None:
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    config = CONFIGS["mistral"]()
    config._attn_implementation = "numbaflash"
    embeds = torch.zeros(2, 30, 64)
    padding = torch.ones(2, 30, dtype=torch.long)
    for make in (create_causal_mask, create_sliding_window_causal_mask):
        assert make(config, embeds, padding, cache=None) is None
        padded = left_padded()["attention_mask"]
        assert make(config, embeds, padded, cache=None).shape == (2, 1, 30, 30)


def test_chunks_are_no_window() -> None:
    from transformers.masking_utils import create_chunked_causal_mask

    config = CONFIGS["llama"]()
    config.attention_chunk_size = 12
    config._attn_implementation = "numbaflash"
    mask = create_chunked_causal_mask(config, torch.zeros(1, 30, 64), torch.ones(1, 30, dtype=torch.long), cache=None)
    assert mask is not None
    assert not mask[0, 0, 12, 11]


def windowed(llama: Any, window: int) -> Any:
    """The Llama's weights in a Mistral with a sliding window and eager attention."""
    config = transformers.MistralConfig(**TINY, sliding_window=window)
    model = transformers.MistralForCausalLM._from_config(config, attn_implementation="eager").eval()
    model.load_state_dict(llama.state_dict())
    return model


@pytest.mark.parametrize("prompt", [5, 30, 90], ids=lambda tokens: f"prompt-{tokens}")
def test_a_ring_generates_200_tokens_as_a_sliding_window_does(prompt: int) -> None:
    llama, _ = models(CONFIGS["llama"]())
    inputs = {"input_ids": prompts(prompt, 1), "attention_mask": torch.ones(1, prompt, dtype=torch.long)}
    cache = RingCache(40)
    out = llama.generate(**inputs, cache=cache, max_new_tokens=200, do_sample=False)
    expected = windowed(llama, 40).generate(**inputs, max_new_tokens=200, do_sample=False)
    assert out.shape == (1, prompt + 200)
    assert torch.equal(out, expected)
    assert cache.get_seq_length() == prompt + 199


def test_a_ring_takes_a_left_padded_batch_and_skips_the_padding() -> None:
    llama, _ = models(CONFIGS["llama"]())
    inputs = left_padded(60)
    out = llama.generate(**inputs, cache=RingCache(24), max_new_tokens=30, do_sample=False)
    expected = windowed(llama, 24).generate(**inputs, max_new_tokens=30, do_sample=False)
    assert torch.equal(out, expected)
    alone = inputs["input_ids"][1:, 20:]
    again = llama.generate(
        input_ids=alone,
        attention_mask=torch.ones_like(alone),
        cache=RingCache(24),
        max_new_tokens=30,
        do_sample=False,
    )
    assert torch.equal(again[0, 40:], out[1, 60:])


def test_sink_tokens_stay_visible() -> None:
    llama, eager = models(CONFIGS["llama"]())
    ids = prompts(60, 1)
    with torch.no_grad():
        cache = RingCache(20, sink_tokens=4)
        out = torch.cat([llama(ids[:, a:b], cache=cache).logits for a, b in ((0, 33), (33, 34), (34, 60))], dim=1)
        i, j = torch.arange(60)[:, None], torch.arange(60)
        visible = (j <= i) & ((j > i - 16) | (j < 4))
        mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
        expected = eager(ids, attention_mask=mask).logits
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_beams_fork_the_ring() -> None:
    llama, _ = models(CONFIGS["llama"]())
    inputs = {"input_ids": prompts(30, 2), "attention_mask": torch.ones(2, 30, dtype=torch.long)}
    options = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False}
    out = llama.generate(**inputs, cache=RingCache(24), **options)
    assert torch.equal(out, windowed(llama, 24).generate(**inputs, **options))


def test_a_second_turn_goes_on_from_what_the_ring_holds() -> None:
    llama, eager = models(CONFIGS["llama"]())
    ring, options = RingCache(200), {"max_new_tokens": 10, "do_sample": False}
    said = llama.generate(prompts(30, 1), cache=ring, **options)
    question = torch.cat((said, prompts(7, 1)), dim=1)
    answer = llama.generate(question, cache=ring, **options)
    assert torch.equal(answer, eager.generate(question, **options))
    assert ring.get_seq_length() == 30 + 10 + 7 + 10 - 1


def test_copies_of_a_prompts_cache_go_on_alone() -> None:
    llama, _ = models(CONFIGS["llama"]())
    prompt, options = prompts(30, 1), {"max_new_tokens": 10, "do_sample": False}
    cache = RingCache(24)
    with torch.no_grad():
        llama(prompt[:, :25], cache=cache)
    for end in (prompt, prompt.flip(1)):
        ids = torch.cat((prompt[:, :25], end[:, 25:]), dim=1)
        out = llama.generate(ids, cache=copy.deepcopy(cache), **options)
        assert torch.equal(out, windowed(llama, 24).generate(ids, **options))
    assert cache.get_seq_length() == 25


def test_a_draft_that_is_rejected_is_taken_back() -> None:
    llama, _ = models(CONFIGS["llama"]())
    ids = prompts(30, 1)
    with torch.no_grad():
        cache = RingCache(20)
        llama(ids, cache=cache)
        llama(prompts(5, 1), cache=cache)
        cache.crop(-5)
        assert cache.get_seq_length() == 30
        out = llama(ids[:, :3], cache=cache).logits
        expected = windowed(llama, 20)(torch.cat((ids, ids[:, :3]), dim=1)).logits[:, -3:]
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_a_token_that_fails_at_a_later_layer_was_taken_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    llama, _ = models(CONFIGS["llama"]())
    ids = prompts(31)
    step = caches.attention_batch

    def failing(rings: Any, layer: int, *tensors: Any, **options: Any) -> Any:
        if layer == 1:
            raise MemoryError
        return step(rings, layer, *tensors, **options)

    with torch.no_grad():
        cache, plain = RingCache(20), RingCache(20)
        for each in (cache, plain):
            llama(ids[:, :30], cache=each)
        with monkeypatch.context() as patch:
            patch.setattr(caches, "attention_batch", failing)
            with pytest.raises(MemoryError):
                llama(ids[:, 30:], cache=cache)
        assert [cache.get_seq_length(layer) for layer in range(2)] == [30, 30]
        assert torch.equal(*(llama(ids[:, 30:], cache=each).logits for each in (cache, plain)))


def test_a_ring_is_of_no_use_to_eager_attention_and_says_so() -> None:
    _, eager = models(CONFIGS["llama"]())
    with torch.no_grad(), pytest.raises(RuntimeError, match='attn_implementation="numbaflash"'):
        eager(prompts(), cache=RingCache(16))


@pytest.mark.parametrize("what", ["later", "earlier", "of one head", "added"])
def test_a_mask_that_a_ring_cannot_obey_is_refused(what: str) -> None:
    llama, _ = models(CONFIGS["llama"]())
    mask = torch.ones(1, 4, 30, 30).tril().bool()
    if what == "added":
        mask = torch.where(mask, -0.5, torch.finfo(torch.float32).min)
    else:
        mask[:, 3 if what == "of one head" else slice(None), 20, 25 if what == "later" else 10] = what == "later"
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="hides nothing but padding, attention_mask asks for"),
    ):
        llama(prompts(), attention_mask=mask, cache=RingCache(64))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_autocast_is_obeyed(name: str) -> None:
    ours, theirs = models(CONFIGS[name]())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = theirs(prompts(12)).logits
        for cache in (None, RingCache(12)):
            logits = ours(prompts(12), cache=cache).logits
            assert (logits - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_a_ring_must_not_outgrow_the_models_own_window() -> None:
    mistral, _ = models(CONFIGS["mistral"]())
    with torch.no_grad(), pytest.raises(ValueError, match="capacity must be at most the model's sliding window 12"):
        mistral(prompts(), cache=RingCache(13))


def test_layers_that_share_keys_are_refused_a_ring() -> None:
    shape: dict[str, Any] = {**TINY, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}
    config = transformers.Gemma3nTextConfig(
        **{**shape, "num_hidden_layers": 3, "intermediate_size": [96] * 3, "activation_sparsity_pattern": [0.0] * 3},
        num_kv_shared_layers=1,
        layer_types=["full_attention"] * 3,
        laurel_rank=4,
    )
    ours, _ = models(config)
    with torch.no_grad(), pytest.raises(ValueError, match="this model's layers share keys: use another cache"):
        ours(prompts(), cache=RingCache(64))


def test_a_decoder_with_more_layers_than_its_encoder_gets_a_ring_for_each() -> None:
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    config = transformers.BartConfig(
        vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=3, init_std=0.3, forced_eos_token_id=None, **heads
    )
    ours, theirs = models(config, transformers.AutoModelForSeq2SeqLM)
    cache = transformers.EncoderDecoderCache(RingCache(64), transformers.DynamicCache())
    options = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(ours.generate(prompts(), cache=cache, **options), theirs.generate(prompts(), **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dropout": 0.1}, "attention dropout must be 0"), ({"position_bias": torch.zeros(1)}, "position bias")],
)
def test_what_is_not_supported_is_named(options: dict[str, Any], message: str) -> None:
    attend = transformers.AttentionInterface()["numbaflash"]
    x = torch.zeros(1, 2, 3, 16)
    with pytest.raises(ValueError, match=message):
        attend(torch.nn.Module(), x, x, x, None, **options)


def test_a_module_that_hides_its_window_is_not_trusted() -> None:
    attend = transformers.AttentionInterface()["numbaflash"]
    module = torch.nn.Module()
    module.config = CONFIGS["mistral"]()
    x = torch.zeros(1, 2, 13, 16)
    with pytest.raises(ValueError, match="does not say its sliding window"):
        attend(module, x, x, x, None)


@pytest.mark.parametrize("cache", [None, RingCache(16)], ids=["no cache", "ring"])
def test_gradients_say_that_there_are_none(cache: RingCache | None) -> None:
    llama, _ = models(CONFIGS["llama"]())
    loss = llama(prompts(), labels=prompts(), cache=cache).loss
    with pytest.raises(NotImplementedError, match="no backward pass"):
        loss.backward()


def test_a_compiled_model_is_one_piece() -> None:
    llama, _ = models(CONFIGS["llama"]())
    compiled = torch.compile(llama, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(prompts(), use_cache=False).logits, llama(prompts(), use_cache=False).logits
        )


def test_the_ring_is_numbaflashs_own() -> None:
    llama, _ = models(CONFIGS["llama"]())
    cache = RingCache(16, dtype="float16")
    with torch.no_grad():
        llama(prompts(), cache=cache)
    ring = numbaflash.RingKVCache(2, 2, 16, capacity=16, dtype="float16")
    for layer in range(2):
        ring.append(layer, torch.zeros(30, 2, 16), torch.zeros(30, 2, 16))
    assert cache.nbytes == 2 * ring.nbytes
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
