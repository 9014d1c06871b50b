"""`numbaflash demo`: start the service, load the model, stream the text, sum up.

The model's context bounds prompt and text together, with a window too: keys lie in the cache with absolute rotary
positions, so the distance to the sink tokens grows with the text, and the model has seen none beyond its context. On
20,000 tokens of English with a window of 256 and 4 sinks, the mean loss is 2.2 to 2.7 nats a token up to position
12,000, and 5.8 at 18,000: the 8,192 of the model's context are the honest end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from json import dumps

from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from numbaflash.cache.page_format import BITS
from numbaflash.cache.quantizers import quantizer_of

from ..client import Client, Session
from ..errors import ServiceError
from ..info import ServerInfo
from . import weights
from .generate import Generation, generate
from .model import Llama, LlamaConfig
from .service_process import ServiceProcess, ServiceUnavailableError, wait_until_serving
from .terminal import Progress, WordWriter, progress
from .tokenizer import Tokenizer

TARGET_SECONDS = 10.0
# The first server on a machine compiles its kernels while it starts, or at its first steps.
START_SECONDS = 300.0
STEP_SECONDS = 300.0

FAILURES = (weights.ModelUnavailableError, ServiceUnavailableError, ServiceError)


class UsageError(ValueError):
    """Options that cannot be met together."""


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        prompt: the user's turn of a chat.
        raw: `prompt` is no turn of a chat, but the text itself.
        max_new_tokens: most tokens to generate.
        temperature: 0 takes the likeliest token, else tokens are drawn.
        target: HOST:PORT or unix:PATH of a server; None starts one.
        window: tokens that the cache keeps visible, sink tokens included; None keeps all.
        sink_tokens: first tokens that a window never drops.
        dtype: of the keys and values in the cache.
        quantizer: of int8 and int4; None is "group".
        backend: of the server that is started; None lets it choose.
    """

    prompt: str
    raw: bool
    max_new_tokens: int
    temperature: float
    target: str | None
    window: int | None
    sink_tokens: int
    dtype: str
    quantizer: str | None
    backend: str | None = None

    def __post_init__(self) -> None:
        """Check the options against each other; the command line has checked each by itself."""
        if self.backend is not None and self.target is not None:
            raise UsageError("--backend is of the server that the demo starts, and does not go with --target")
        if self.window is not None and self.window <= self.sink_tokens:
            raise UsageError(f"--window must be greater than --sink-tokens ({self.sink_tokens}), got {self.window}")
        if self.quantizer is not None:
            try:
                quantizer_of(self.quantizer)
            except ValueError as error:
                raise UsageError(f"--quantizer: {error}") from None
            if self.dtype not in BITS:
                raise UsageError(f"--quantizer goes with --kv-dtype {' or '.join(BITS)}, got {self.dtype}")

    @property
    def kept_sinks(self) -> int:
        """Sink tokens of the cache: quantized, it keeps them in float16, and without a window it needs none else."""
        return self.sink_tokens if self.window or self.dtype in BITS else 0


@dataclass(frozen=True)
class Stage:
    """All that is needed to generate text."""

    tokenizer: Tokenizer
    model: Llama
    prompt_ids: list[int]
    session: Session
    server: ServerInfo


def run(*, json: bool, **options: str | bool | int | float | None) -> None:
    """Generate text: streamed, with a table after it, or as one JSON object.

    Args:
        json: print one JSON object, and nothing else to standard output.
        options: those of `Options`.

    Raises:
        UsageError: there is no prompt, it exceeds the model's context, or the window is all sinks.
        ModelUnavailableError: there is no model.
        ServiceUnavailableError: there is no service.
        ServiceError: the service refused or failed.
    """
    asked = Options(**options)  # type: ignore[arg-type]  # typer has checked their types
    with ExitStack() as stack:
        # The service computes on the other cores. BLAS threads wait for each other by spinning: where other processes
        # want the cores too, a prompt of 34 tokens takes 2 to 6 s instead of 0.3.
        stack.enter_context(threadpool_limits(max(1, len(os.sched_getaffinity(0)) // 2), user_api="blas"))
        with progress() as say:
            stage = prepare(asked, stack, say)
        if json:
            print(dumps(figures(stage, _generate(asked, stage, lambda _: None))))
            return
        console = Console(highlight=False)
        where = f"at {asked.target}" if asked.target else "of its own"
        console.print(f"[dim]{weights.MODEL_NAME}, its attention computed by a service {where}[/dim]\n")
        console.print(asked.prompt, style="bold", markup=False, end="\n\n")
        text_of = stage.tokenizer.stream()
        with WordWriter.to_stdout() as writer:
            generation = _generate(asked, stage, lambda token: writer.write(text_of(token)))
        console.print()
        console.print(summary(stage, generation))


def prepare(asked: Options, stack: ExitStack, say: Progress) -> Stage:
    """Start the service and load the model, at the same time; leave an empty session and compiled kernels.

    Args:
        asked: the user's options.
        stack: ends what is started here.
        say: is told what takes time.
    """
    if asked.target is None:
        say("Starting the service")
        process = stack.enter_context(ServiceProcess(asked.backend))
        target = process.target
    else:
        say(f"Connecting to {asked.target}")
        process, target = None, asked.target
        wait_until_serving(target, TARGET_SECONDS)
    checkpoint = weights.load(say)
    tokenizer, model = Tokenizer(checkpoint.fields), Llama(checkpoint)
    prompt_ids = tokenizer.encode(asked.prompt if asked.raw else tokenizer.chat(asked.prompt))
    _check_length(prompt_ids, asked.max_new_tokens, model.config)
    if process:
        say("Waiting for the service")
        wait_until_serving(target, START_SECONDS, process.check_alive)
    client = stack.enter_context(Client(target, timeout=STEP_SECONDS))
    say("Warming up (the first time compiles kernels)")
    _warm_up(client, model, asked)
    session = _create_session(
        client,
        model.config,
        capacity=asked.window or len(prompt_ids) + asked.max_new_tokens + asked.kept_sinks,
        asked=asked,
    )
    say("Reading the prompt")
    return Stage(tokenizer, model, prompt_ids, session, client.info())


def figures(stage: Stage, generation: Generation) -> dict[str, object]:
    """What `--json` prints."""
    return {
        "prompt_ids": stage.prompt_ids,
        "new_ids": generation.new_ids,
        "text": stage.tokenizer.decode(generation.new_ids),
        "finish_reason": generation.finish_reason,
        "prefill_s": generation.prefill_s,
        "decode_tokens_per_s": generation.decode_tokens_per_s,
        "attention_share": generation.attention_share,
        "kv_bytes": stage.session.max_nbytes,
        "backend": stage.server.backend,
    }


def summary(stage: Stage, generation: Generation) -> Table:
    """What stands below the text."""
    prompt_tokens = len(stage.prompt_ids)
    ended = "the model ended the text" if generation.finish_reason == "stop" else "--max-new-tokens"
    table = Table(show_header=False)
    table.add_row("Prompt tokens", f"{prompt_tokens}")
    table.add_row("Prefill", f"{generation.prefill_s:.3f} s ({prompt_tokens / generation.prefill_s:.0f} tokens/s)")
    table.add_row("New tokens", f"{len(generation.new_ids)}, then {ended}")
    if generation.decode_tokens_per_s is not None:
        table.add_row("Decode", f"[bold]{generation.decode_tokens_per_s:.1f} tokens/s[/bold]")
        table.add_row("... attention", f"{generation.attention_share:.0%} of that time, round trips included")
    table.add_row("KV bytes", f"{stage.session.max_nbytes:,} ({stage.session.dtype})")
    table.add_row("Backend", f"{stage.server.backend}, {stage.server.device}")
    return table


def _generate(asked: Options, stage: Stage, on_token: Callable[[int], None]) -> Generation:
    return generate(
        stage.model,
        stage.session,
        stage.prompt_ids,
        max_new_tokens=asked.max_new_tokens,
        stop_ids=stage.tokenizer.stop_ids,
        temperature=asked.temperature,
        on_token=on_token,
    )


def _check_length(prompt_ids: list[int], max_new_tokens: int, config: LlamaConfig) -> None:
    if not prompt_ids:
        raise UsageError("--prompt must have at least one token, got an empty text")
    if len(prompt_ids) + max_new_tokens > config.context_length:
        raise UsageError(
            f"--prompt and --max-new-tokens together must fit the model's context of {config.context_length} tokens, "
            f"got {len(prompt_ids)} + {max_new_tokens}"
        )


def _create_session(client: Client, config: LlamaConfig, *, capacity: int, asked: Options) -> Session:
    return client.create_session(
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
        capacity=capacity,
        sink_tokens=asked.kept_sinks,
        dtype=asked.dtype,
        quantizer=asked.quantizer,
        num_q_heads=config.num_heads,
    )


def _warm_up(client: Client, model: Llama, asked: Options) -> None:
    """Take steps of both kinds, so that what is timed later contains no compilation."""
    tokens = 32 if asked.dtype not in BITS else 80  # the first page is quantized, too
    with _create_session(client, model.config, capacity=2 * tokens + asked.kept_sinks, asked=asked) as session:
        model.forward([0] * tokens, 0, session)
        model.forward([0], tokens, session)
