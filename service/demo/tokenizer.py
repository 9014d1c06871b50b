"""Text to token ids and back, with the vocabulary, merges and chat template that the model's own file carries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders, models, pre_tokenizers

CONTROL = 3  # gguf.TokenType.CONTROL: <|im_start|> and its like


class Tokenizer:
    """Byte-level BPE of SmolLM2.

    Args:
        fields: the GGUF file's metadata.

    Raises:
        ValueError: the file's tokenizer is of another kind.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        kind = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
        if kind != ("gpt2", "smollm"):
            raise ValueError(f"tokenizer.ggml.model, tokenizer.ggml.pre: got {kind}, expected ('gpt2', 'smollm')")
        tokens = fields["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
        self._bpe = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        # What "smollm" stands for: digits one by one, then GPT-2's words.
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        self._bpe.decoder = decoders.ByteLevel()
        types = fields["tokenizer.ggml.token_type"]
        self._bpe.add_special_tokens([t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL])
        self._chat_template = ImmutableSandboxedEnvironment().from_string(fields["tokenizer.chat_template"])
        #: Generation ends at one of these: the end of a chat turn, or the end of a document.
        self.stop_ids = frozenset({fields["tokenizer.ggml.eos_token_id"], tokens.index("<|endoftext|>")})

    def chat(self, prompt: str) -> str:
        """The prompt as the user's turn of a chat, with the assistant's turn opened."""
        messages = [{"role": "user", "content": prompt}]
        return str(self._chat_template.render(messages=messages, add_generation_prompt=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` as it is; the names of special tokens in it become those tokens.

        The vocabulary lacks a few bytes (control characters, planes beyond U+3FFFF): those are dropped.
        """
        return list(self._bpe.encode(text).ids)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens by their names."""
        return str(self._bpe.decode(ids, skip_special_tokens=False))

    def stream(self) -> Callable[[int], str]:
        """A function that takes one id after the other and returns the text that became complete (maybe none)."""
        decoder = decoders.DecodeStream(skip_special_tokens=False)
        return lambda token: decoder.step(self._bpe, token) or ""
