"""`numbaflash demo`: start the service, load the model, stream the text, sum up.

The model's context bounds prompt and text together, with a window too: keys lie in the cache with absolute rotary
positions, so the distance to the sink tokens grows with the text, and the model has seen none beyond its context. On
20,000 tokens of English with a window of 256 and 4 sinks, the mean loss is 2.2 to 2.7 nats a token up to position
12,000, and 5.8 at 18,000: the 8,192 of the model's context are the honest end.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from json import dumps

from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from ..client import Client
from ..errors import ServiceError
from . import weights
from .generate import Generation, generate
from .model import Llama, LlamaConfig
from .service_process import ServiceProcess, ServiceUnavailableError, wait_until_serving
from .tokenizer import Tokenizer

TARGET_SECONDS = 10.0
# The first server on a machine compiles its kernels while it starts.
START_SECONDS = 300.0
# The first steps may compile kernels.
STEP_SECONDS = 300.0

Progress = Callable[[str], None]


FAILURES = (weights.ModelUnavailableError, ServiceUnavailableError, ServiceError)


class UsageError(ValueError):
    """Options that cannot be met together."""


def run(
    *,
    prompt: str,
    max_new_tokens: int,
    target: str | None,
    temperature: float,
    raw: bool,
    window: int | None,
    sink_tokens: int,
    dtype: str,
    json: bool,
) -> None:
    """Generate text: streamed, with a table after it, or as one JSON object.

    Args:
        prompt: the user's turn of a chat.
        max_new_tokens: most tokens to generate.
        target: HOST:PORT or unix:PATH of a server; None starts one.
        temperature: 0 takes the likeliest token, else tokens are drawn.
        raw: `prompt` is no turn of a chat, but the text itself.
        window: tokens that the cache keeps visible, sink tokens included; None keeps all.
        sink_tokens: first tokens that a window never drops.
        dtype: of the keys and values in the cache.
        json: print one JSON object, and nothing else to standard output.

    Raises:
        UsageError: there is no prompt, it exceeds the model's context, or the window is all sinks.
        ModelUnavailableError: there is no model.
        ServiceUnavailableError: there is no service.
        ServiceError: the service refused or failed.
    """
    if window is not None and window <= sink_tokens:
        raise UsageError(f"--window must be greater than --sink-tokens ({sink_tokens}), got {window}")
    with ExitStack() as stack:
        # The service computes on the other cores. BLAS threads wait for each other by spinning: where other processes
        # want the cores too, a prompt of 34 tokens takes 2 to 6 s instead of 0.3.
        stack.enter_context(threadpool_limits(max(1, len(os.sched_getaffinity(0)) // 2), user_api="blas"))
        with progress() as say:
            process = None
            if target is None:
                say("Starting the service")
                process = stack.enter_context(ServiceProcess())
                target = process.target
            else:
                wait_until_serving(target, TARGET_SECONDS)
            # The server starts meanwhile.
            checkpoint = weights.load(say)
            tokenizer, model = Tokenizer(checkpoint.fields), Llama(checkpoint)
            prompt_ids = tokenizer.encode(prompt if raw else tokenizer.chat(prompt))
            _check_length(prompt_ids, max_new_tokens, model.config)
            if process:
                say("Waiting for the service (the first start compiles its kernels)")
                wait_until_serving(target, START_SECONDS, process.check_alive)
            client = stack.enter_context(Client(target, timeout=STEP_SECONDS))
            backend = client.info().backend
            say("Warming up (the first time compiles kernels)")
            _warm_up(client, model, dtype)
            session = client.create_session(
                model.config.num_layers,
                model.config.num_kv_heads,
                model.config.head_dim,
                capacity=window or len(prompt_ids) + max_new_tokens,
                sink_tokens=sink_tokens if window else 0,
                dtype=dtype,
            )
            say("Reading the prompt")
        write = _write(tokenizer) if not json else lambda _: None
        console = Console(highlight=False)
        if not json:
            console.print(f"[dim]{weights.MODEL_NAME}; attention by numbaflash at {target}[/dim]\n")
            console.print(prompt, style="bold", markup=False)
            print()
        generation = generate(
            model,
            session,
            prompt_ids,
            max_new_tokens=max_new_tokens,
            stop_ids=tokenizer.stop_ids,
            temperature=temperature,
            on_token=write,
        )
        if json:
            figures = {
                "prompt_ids": prompt_ids,
                "new_ids": generation.new_ids,
                "text": tokenizer.decode(generation.new_ids),
                "finish_reason": generation.finish_reason,
                "prefill_s": generation.prefill_s,
                "decode_tokens_per_s": generation.decode_tokens_per_s,
                "attention_share": generation.attention_share,
                "kv_bytes": session.max_nbytes,
                "backend": backend,
            }
            print(dumps(figures))
        else:
            print("\n")
            console.print(_summary(generation, len(prompt_ids), session.max_nbytes, dtype, backend))


@contextmanager
def progress() -> Iterator[Progress]:
    """A function that tells the user what is going on: on a terminal in one line that changes, else line by line."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
    else:
        yield lambda what: console.print(what, soft_wrap=True)


def _check_length(prompt_ids: list[int], max_new_tokens: int, config: LlamaConfig) -> None:
    if not prompt_ids:
        raise UsageError("--prompt must have at least one token, got an empty text")
    if len(prompt_ids) + max_new_tokens > config.context_length:
        raise UsageError(
            f"--prompt and --max-new-tokens together must fit the model's context of {config.context_length} tokens, "
            f"got {len(prompt_ids)} + {max_new_tokens}"
        )


def _warm_up(client: Client, model: Llama, dtype: str) -> None:
    """Take steps of both kinds, so that what is timed later contains no compilation."""
    config, tokens = model.config, 32
    with client.create_session(
        config.num_layers, config.num_kv_heads, config.head_dim, capacity=2 * tokens, dtype=dtype
    ) as session:
        model.forward([0] * tokens, 0, session)
        model.forward([0], tokens, session)


def _write(tokenizer: Tokenizer) -> Callable[[int], None]:
    text_of = tokenizer.stream()

    def write(token: int) -> None:
        sys.stdout.write(text_of(token))
        sys.stdout.flush()

    return write


def _summary(generation: Generation, prompt_tokens: int, kv_bytes: int, dtype: str, backend: str) -> Table:
    table = Table(show_header=False)
    table.add_row("Prompt", f"{prompt_tokens} tokens")
    table.add_row("Prefill", f"{generation.prefill_s:.3f} s ({prompt_tokens / generation.prefill_s:.0f} tokens/s)")
    ended = "the model ended the text" if generation.finish_reason == "stop" else "--max-new-tokens"
    table.add_row("New text", f"{len(generation.new_ids)} tokens, then {ended}")
    if generation.decode_tokens_per_s is not None and generation.attention_share is not None:
        table.add_row(
            "Decode",
            f"[bold]{generation.decode_tokens_per_s:.1f} tokens/s[/bold], {generation.attention_share:.0%} of the time "
            "for attention and its round trips",
        )
    table.add_row("KV cache", f"{kv_bytes:,} bytes, {dtype}")
    table.add_row("Backend", backend)
    return table
