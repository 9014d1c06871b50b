from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numbaflash_service.demo.tokenizer import Tokenizer
from numbaflash_service.demo.weights import Checkpoint

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def test_the_chat_template_of_the_file_gives_chatml(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    template = checkpoint.fields["tokenizer.chat_template"]
    assert SYSTEM.splitlines()[1] in template  # the system text is the file's own
    assert tokenizer.chat("Hi {{ 1 }}!") == SYSTEM + (
        "<|im_start|>user\nHi {{ 1 }}!<|im_end|>\n<|im_start|>assistant\n"
    )


def test_special_tokens_in_a_text_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>") == [1, 4093, 198, 2]


def test_nothing_is_put_in_front_of_a_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Once upon a time")
    assert tokenizer.decode(ids[:1]) == "Once"
    assert tokenizer.encode("") == []


def test_digits_are_tokens_one_by_one_and_spaces_stay_apart_from_them(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a  12345 b")
    assert [tokenizer.decode([i]) for i in ids] == ["a", "  ", "1", "2", "3", "4", "5", " b"]


def test_generation_stops_at_the_end_of_a_turn_or_of_the_text(tokenizer: Tokenizer) -> None:
    assert {tokenizer.decode([i]) for i in tokenizer.stop_ids} == {"<|im_end|>", "<|endoftext|>"}


# The vocabulary lacks the bytes of these control characters, and of the planes beyond.
in_vocabulary = st.characters(max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d", codec="utf-8")


@given(st.text(in_vocabulary))
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "🙂🙃 done", " leading and  double  spaces "])
def test_a_stream_gives_the_whole_text_and_no_half_characters(tokenizer: Tokenizer, text: str) -> None:
    push = tokenizer.stream()
    pieces = [push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)


def test_another_kind_of_tokenizer_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre"):
        Tokenizer({**checkpoint.fields, "tokenizer.ggml.pre": "llama-bpe"})
