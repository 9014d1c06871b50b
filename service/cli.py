"""The command line, `numbaflash ...`: options, and one function of another module behind each command.

Exit status: 0, 2 on bad usage, 1 on failure. The module behind a command is imported when the command runs, since each
needs an extra of its own.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    help="FlashAttention and the KV cache in pure Python, and a gRPC service that holds the cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class Algorithm(StrEnum):
    """Algorithms of attention."""

    standard = "standard"
    v1 = "v1"
    v2 = "v2"


class Dtype(StrEnum):
    """Dtypes of queries, keys and values."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Bias(StrEnum):
    """Kinds of bias."""

    none = "none"
    float32 = "float32"
    same = "same"
    bool = "bool"


class Backend(StrEnum):
    """Where attention is computed."""

    cpu = "cpu"
    cuda = "cuda"
    emulated = "emulated"


class KVDtype(StrEnum):
    """Storage dtypes of a session's cache."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"
    int4 = "int4"


def main() -> None:
    """Run the command that the process was started with."""
    _let_waiting_threads_poll()
    app()


def _let_waiting_threads_poll() -> None:
    """Switch gRPC's event engine off, which hands what a socket brings to another thread: before gRPC is imported.

    Python has had it since 1.80. Of a token of the demo, attention takes 45 % of the time without it, and 50 with it.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        major, minor = map(int, importlib.metadata.version("grpcio").split(".")[:2])
        if (1, 80) <= (major, minor) <= (1, 85):  # later ones may not know these names, and would complain
            os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")


@app.command()
def serve(
    config: Annotated[Path | None, typer.Option(help="A TOML file with any of the options below.")] = None,
    listen: Annotated[
        list[str] | None,
        typer.Option(help="Address to serve on: HOST:PORT (port 0: any free one) or unix:PATH. May be repeated."),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="cpu, cuda or emulated; by default what the machine has.")] = None,
    kv_memory: Annotated[str | None, typer.Option(help="Budget for keys and values, such as 4GiB.")] = None,
    kv_high_water: Annotated[float | None, typer.Option(help="Share of it above which idle sessions spill.")] = None,
    spill_dir: Annotated[Path | None, typer.Option(help="Folder for idle sessions whose memory is needed.")] = None,
    spill_memory: Annotated[str | None, typer.Option(help="Budget for sessions there.")] = None,
    spill_after: Annotated[float | None, typer.Option(help="Seconds idle until a session may be spilled.")] = None,
    evict_after: Annotated[float | None, typer.Option(help="... until it may be ended where it cannot.")] = None,
    snapshot_dir: Annotated[Path | None, typer.Option(help="Folder for snapshots; default: in --spill-dir.")] = None,
    snapshot_memory: Annotated[str | None, typer.Option(help="Budget for snapshots.")] = None,
    replay_memory: Annotated[str | None, typer.Option(help="Budget for answers kept to be sent again.")] = None,
    max_message_bytes: Annotated[str | None, typer.Option(help="Largest message accepted.")] = None,
    max_sessions: Annotated[int | None, typer.Option(help="Sessions at a time.")] = None,
    max_calls: Annotated[int | None, typer.Option(help="Calls and streams under way at a time.")] = None,
    max_queued_steps: Annotated[int | None, typer.Option(help="Steps waiting or running at a time.")] = None,
    max_queued_bytes: Annotated[str | None, typer.Option(help="Bytes of those steps.")] = None,
    max_queue_time: Annotated[float | None, typer.Option(help="Seconds that a step may wait.")] = None,
    max_in_flight: Annotated[int | None, typer.Option(help="Steps in flight on one Attend stream.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Steps computed together at most.")] = None,
    batch_wait: Annotated[float | None, typer.Option(help="Seconds that a step waits for others like it.")] = None,
    default_ttl: Annotated[float | None, typer.Option(help="Seconds without a step until a session ends.")] = None,
    max_ttl: Annotated[float | None, typer.Option(help="The most that a client may ask for.")] = None,
    grace: Annotated[float | None, typer.Option(help="Seconds that calls have to finish on SIGTERM.")] = None,
    quota_sessions: Annotated[int | None, typer.Option(help="Sessions of one caller.")] = None,
    quota_kv_memory: Annotated[str | None, typer.Option(help="Keys and values of one caller, such as 1GiB.")] = None,
    quota_tokens_per_second: Annotated[
        float | None, typer.Option(help="Tokens of one caller a second, through all layers.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file of a certificate: TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM file of roots: clients need a certificate of theirs.")
    ] = None,
    auth_tokens: Annotated[
        Path | None, typer.Option(help="File of accepted bearer tokens, lines 'NAME sha256:DIGEST'.")
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Serve other machines without TLS or without asking who calls.")
    ] = None,
    reflection: Annotated[bool | None, typer.Option("--reflection/--no-reflection", help="gRPC reflection.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="HTTP port of metrics and the status page (0: any free one); by default none.")
    ] = None,
    metrics_host: Annotated[str | None, typer.Option(help="Address of that port; 127.0.0.1 by default.")] = None,
    otlp_endpoint: Annotated[str | None, typer.Option(help="Collector of OpenTelemetry spans, over gRPC.")] = None,
    pin_event_loop: Annotated[
        bool | None,
        typer.Option("--pin-event-loop/--no-pin-event-loop", help="Keep it on the CPU where it starts; by default."),
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="json or text; by default text on a terminal.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Serve sessions over gRPC.

    What is not given here is taken from environment variables (NUMBAFLASH_KV_MEMORY=4GiB), then from the TOML file,
    then from the defaults.
    """
    flags = {name: value for name, value in locals().items() if value is not None}
    configuration = _load("config", extra="service")
    try:
        settings = configuration.load(**flags)
    except (ValueError, OSError) as error:
        _bad_usage(error)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # what else it has to say is no JSON
    server = _load("server", extra="service")
    try:
        server.serve(settings)
    except (ValueError, OSError) as error:
        _fail(str(error))


@app.command()
def sessions(
    target: Annotated[str, typer.Option(help="Address of the server.")] = "127.0.0.1:50051",
    ca: Annotated[Path | None, typer.Option(help="PEM file of the roots of the server's certificate: TLS.")] = None,
    cert: Annotated[Path | None, typer.Option(help="PEM file of a certificate of one's own, under mutual TLS.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="File that holds one's bearer token.")] = None,
    json: Json = False,
) -> None:
    """List the sessions that a server holds; where it asks who calls, those of the caller."""
    errors, listing = _load("errors", extra="service"), _load("listing", extra="service")
    try:
        listing.run(target, ca=ca, cert=cert, key=key, token_file=token_file, json=json)
    except errors.ServiceError as error:
        _fail(f"{target}: {error}")
    except ValueError as error:
        _bad_usage(error)
    except OSError as error:
        _fail(str(error))


@app.command()
def doctor(json: Json = False) -> None:
    """Say what is installed, which backend would be used and why, and what is missing."""
    _load("doctor").run(json=json)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Smaller problems: seconds instead of minutes.")] = False,
    json: Json = False,
) -> None:
    """Measure attention on this machine, beside its peers."""
    _load("bench").run(json=json, quick=quick)


@app.command()
def roofline(
    hardware: Annotated[
        list[str] | None, typer.Option(help="What to reckon for, by its name in the list; may be repeated.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of a prompt, and in the cache: a multiple of 256.")] = 4096,
    head_dim: Annotated[int, typer.Option(help="A multiple of 32, at most 256.")] = 128,
    q_heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(help="Heads of keys and values where they are grouped.")] = 8,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure this machine: two seconds, and it joins the list.")
    ] = True,
    plot: Annotated[Path | None, typer.Option(help="Draw it in this file, .svg or .png.")] = None,
    bench: Annotated[
        Path | None,
        typer.Option(help="Points to draw: what 'numbaflash bench --json' has printed; by default the last benchmark."),
    ] = None,
    json: Json = False,
) -> None:
    """Say what bounds attention, memory or arithmetic, and the least time that one layer takes.

    Figures of GPUs are their datasheets'; this machine is measured.
    """
    command = _load("roofline")
    try:
        command.run(
            shape=command.Shape(tokens, head_dim, q_heads, kv_heads, batch),
            hardware=hardware or [command.DEFAULT_HARDWARE],
            measure=measure,
            json=json,
            plot=plot,
            bench=bench,
        )
    except ModuleNotFoundError as error:
        _missing(error, "plot")
    except ValueError as error:
        _bad_usage(error)
    except OSError as error:
        _fail(str(error))


@app.command()
def capacity(
    model: Annotated[str | None, typer.Option(help="A preset, by default Llama-2-7B-8KV.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="... or the model in a GGUF file.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a session; default: the model's.")] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens that stay visible, sink tokens included; default: all.")
    ] = None,
    sink_tokens: Annotated[int, typer.Option(min=0, help="First tokens that a window never drops.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Sessions at a time.")] = 1,
    dtype: Annotated[
        KVDtype | None, typer.Option("--dtype", "--kv-dtype", help="A storage beside those that are always shown.")
    ] = None,
    quantizer: Annotated[
        str | None, typer.Option(help="Of int8 and int4, with options as in hqq:group_size=32.")
    ] = None,
    page_size: Annotated[int, typer.Option(help="Tokens of a page.")] = 64,
    rollback: Annotated[int, typer.Option(min=0, help="Newest tokens that can be taken back.")] = 64,
    weights_gb: Annotated[
        float | None, typer.Option(min=0.0, help="GB of the weights; default: in 16 bits, or as the file has them.")
    ] = None,
    json: Json = False,
) -> None:
    """Say how much memory a model's KV cache takes, and how many sessions a GPU holds."""
    try:
        _load("capacity").run(
            model=model,
            gguf=gguf,
            context=context,
            window=window,
            sink_tokens=sink_tokens,
            batch=batch,
            dtype=None if dtype is None else dtype.value,
            quantizer=quantizer,
            page_size=page_size,
            rollback=rollback,
            weights_gb=weights_gb,
            json=json,
        )
    except ModuleNotFoundError as error:
        _missing(error, "demo")
    except ValueError as error:
        _bad_usage(error)
    except OSError as error:
        _fail(str(error))


@app.command()
def inspect(
    algorithm: Annotated[Algorithm, typer.Option(help="Which attention.")] = Algorithm.v2,
    head_dim: Annotated[int, typer.Option(min=1, max=256, help="Elements of a query and a key.")] = 128,
    value_dim: Annotated[int | None, typer.Option(min=1, max=256, help="Of a value; default: as many.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the arrays.")] = Dtype.float16,
    cc: Annotated[str, typer.Option(help="Compute capability: 8.0, 8.6, 8.9 or 9.0.")] = "8.0",
    causal: Annotated[bool, typer.Option("--causal", help="Causal mask.")] = False,
    left: Annotated[int | None, typer.Option(min=0, help="Tokens that a query sees before its own.")] = None,
    right: Annotated[int | None, typer.Option(min=0, help="... behind its own.")] = None,
    softcap: Annotated[float, typer.Option(min=0.0, help="Cap of the scores.")] = 0.0,
    bias: Annotated[Bias, typer.Option(help="Of the scores; same: of the arrays' dtype.")] = Bias.none,
    alibi: Annotated[bool, typer.Option("--alibi", help="A slope for each head.")] = False,
    sinks: Annotated[bool, typer.Option("--sinks", help="A sink logit for each head.")] = False,
    lengths: Annotated[bool, typer.Option("--lengths", help="A number of keys for each batch entry.")] = False,
    lse: Annotated[bool, typer.Option("--lse", help="The log-sum-exp is written as well.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="A step over a cache, as the options below say.")] = False,
    q_heads: Annotated[int, typer.Option(min=1, help="Of a step: query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="... KV heads.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="... tokens in the cache, a multiple of 64.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="... its own.")] = 1,
    kv_dtype: Annotated[KVDtype | None, typer.Option(help="... of the cache; default: of the arrays.")] = None,
    ptx: Annotated[Path | None, typer.Option(help="Write the PTX text to this file.")] = None,
    sass: Annotated[Path | None, typer.Option(help="Write the machine code to this file.")] = None,
    json: Json = False,
) -> None:
    """Say what the kernels for GPUs take, beside FlashAttention-2; needs no GPU.

    Registers, shared memory and instructions are of the built code; bank conflicts and sectors are counted while the
    emulator runs it; how busy the tensor cores are is what a model says, and no measurement.
    """
    target = re.fullmatch(r"(\d+)\.(\d)", cc)
    if target is None:
        _bad_usage(ValueError(f"cc must be such as 8.0, got {cc!r}"))
    try:
        inspection = _load("inspection", extra="cuda")
        common: dict[str, Any] = {
            "head_dim": head_dim,
            "dtype": dtype.value,
            "cc": (int(target[1]), int(target[2])),
            "softcap": softcap,
            "alibi": alibi,
            "sinks": sinks,
            "json": json,
            "ptx": ptx,
            "sass": sass,
        }
        if decode:
            others = {"value-dim": value_dim, "causal": causal, "left": left, "right": right, "lengths": lengths}
            others |= {"lse": lse, "bias": bias is not Bias.none, "algorithm": algorithm is not Algorithm.v2}
            if given := [f"--{name}" for name, value in others.items() if value not in (None, False)]:
                raise ValueError(f"--decode does not go with {', '.join(given)}")
            inspection.run_step(
                q_heads=q_heads,
                kv_heads=kv_heads,
                tokens=tokens,
                new_tokens=new_tokens,
                kv_dtype=None if kv_dtype is None else kv_dtype.value,
                **common,
            )
            return
        inspection.run(
            algorithm=algorithm.value,
            value_dim=value_dim,
            causal=causal,
            window=(left, right),
            bias=bias.value,
            lengths=lengths,
            lse=lse,
            **common,
        )
    except ValueError as error:
        _bad_usage(error)
    except (RuntimeError, OSError) as error:
        _fail(str(error))


@app.command()
def demo(
    prompt: Annotated[str, typer.Option(help="What to ask the model.")] = "What is gravity?",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    target: Annotated[str | None, typer.Option(help="A server to use; by default one is started.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token; above: drawn at random.")] = 0.0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens that the cache keeps visible, sink tokens included; default: all.")
    ] = None,
    sink_tokens: Annotated[int, typer.Option(min=0, help="First tokens that a window never drops.")] = 4,
    dtype: Annotated[
        KVDtype, typer.Option("--dtype", "--kv-dtype", help="Of the keys and values in the cache.")
    ] = KVDtype.float32,
    quantizer: Annotated[
        str | None, typer.Option(help="Of int8 and int4: group or hqq, with options as in hqq:group_size=32.")
    ] = None,
    backend: Annotated[
        Backend | None, typer.Option(help="Where the server that is started computes; default: as `serve`.")
    ] = None,
    json: Json = False,
) -> None:
    """Let a real language model generate text through the service.

    SmolLM2-135M-Instruct is downloaded once (93 MB) into the user's cache.
    """
    command = _load("demo.command", extra="demo")
    try:
        command.run(
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            target=target,
            temperature=temperature,
            raw=raw,
            window=window,
            sink_tokens=sink_tokens,
            dtype=dtype.value,
            quantizer=quantizer,
            backend=None if backend is None else backend.value,
            json=json,
        )
    except command.UsageError as error:
        _bad_usage(error)
    except command.FAILURES as error:
        _fail(str(error))


def _load(module: str, extra: str | None = None) -> Any:
    """Import the module behind a command; say in one line which extra it needs where that is not installed."""
    try:
        return importlib.import_module(f".{module}", __package__)
    except ModuleNotFoundError as error:
        if extra is None or (error.name or "").startswith("numbaflash"):
            raise
        _missing(error, extra)


def _missing(error: ModuleNotFoundError, extra: str) -> NoReturn:
    _fail(f"{error.name} is not installed; this command needs: pip install 'numbaflash[{extra}]'")


def _bad_usage(error: Exception) -> NoReturn:
    problems = getattr(error, "errors", None)  # pydantic lists them
    lines = [str(error)]
    if problems:
        lines = [
            f"{'.'.join(map(str, p['loc'])) or 'configuration'}: {p['msg'].removeprefix('Value error, ')}"
            for p in problems()
        ]
    for line in lines:
        typer.echo(f"numbaflash: {line}", err=True)
    raise typer.Exit(2)


def _fail(message: str) -> NoReturn:
    typer.echo(f"numbaflash: {message}", err=True)
    raise typer.Exit(1)
