"""What `numbaflash inspect` says of kernels is what they take."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from numbaflash.cache.inspection import inspect_step
from numbaflash.cuda.inspection import FLASH_ATTENTION_2, inspect
from numbaflash.cuda.occupancy import Occupancy, occupancy
from numbaflash_service.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *arguments], terminal_width=80)


@pytest.mark.parametrize(
    ("cc", "registers", "threads", "shared", "blocks", "limits"),
    [
        ((8, 0), 32, 1024, 0, 2, ("registers", "warps")),
        ((8, 6), 32, 512, 0, 3, ("warps",)),
        ((8, 0), 255, 128, 48 << 10, 2, ("registers",)),
        ((8, 0), 24, 128, 64 << 10, 2, ("shared memory",)),
        ((8, 9), 24, 128, 64 << 10, 1, ("shared memory",)),
        ((9, 0), 16, 32, 0, 32, ("blocks",)),
    ],
)
def test_resident_blocks_are_those_of_nvidias_occupancy_tables(cc, registers, threads, shared, blocks, limits):
    assert occupancy(cc, registers, threads, shared) == Occupancy(blocks, limits)


def test_figures_are_of_the_built_code_and_of_its_run():
    (kernel,) = inspect(causal=True)
    assert (kernel.name, kernel.threads, kernel.shared_bytes) == ("flash_v2", 128, 65536)
    assert kernel.occupancy.blocks == 2
    assert (kernel.spill_bytes, kernel.stack_bytes, kernel.bank_conflicts) == (0, 0, 0)
    assert kernel.sector_efficiency == 1
    assert (
        kernel.loop.mix["HMMA"] == kernel.loop.mmas == kernel.sass.count("HMMA.16816") // 2
    )  # as much for blocks with a mask
    assert sum(kernel.loop.mix.values()) == kernel.loop.instructions < kernel.instructions
    assert kernel.loop.cycles_per_mma["tensor"] == 8
    assert kernel.loop.tensor_share > FLASH_ATTENTION_2[128, True].tensor_share
    assert ".visible .entry flash_v2(" in kernel.ptx


def test_every_launch_of_an_algorithm_is_inspected():
    kernels = inspect(algorithm="standard", head_dim=64, softcap=1.0, bias="bool", alibi=True, sinks=True, lengths=True)
    assert [kernel.name for kernel in kernels] == ["standard_scores", "standard_softmax", "standard_values"]
    assert [kernel.loop is None for kernel in kernels] == [True, True, False]


def test_the_table_fits_80_columns_and_names_the_peer_where_the_problem_is_its_own():
    shown = run("--causal")
    assert shown.exit_code == 0
    assert max(map(len, shown.output.splitlines())) <= 80
    assert "FlashAttention-2" in shown.output
    assert "FlashAttention-2" not in run("--causal", "--sinks").output


def test_listings_and_figures_can_be_written(tmp_path):
    ptx, sass = tmp_path / "kernel.ptx", tmp_path / "kernel.sass"
    said = json.loads(run("--causal", "--json", "--ptx", str(ptx), "--sass", str(sass)).output)
    assert said["problem"]["head_dim"] == 128
    assert said["flash_attention_2"]["mmas"] == said["kernels"][0]["loop"]["mmas"]
    assert ".target sm_80" in ptx.read_text()
    assert "HMMA.16816.F32" in sass.read_text()
    missing = run("--causal", "--ptx", str(tmp_path / "no" / "such.ptx"))
    assert missing.exit_code == 1
    assert "No such file" in missing.output


def test_a_step_of_decode_says_what_its_kernels_take_and_what_it_reads():
    step = inspect_step(q_heads=8, kv_heads=1, head_dim=64, tokens=256)
    assert [kernel.name for kernel in step.kernels] == ["tensor_decode", "finish_step"]
    assert [kernel.spill_bytes for kernel in step.kernels] == [0, 0]
    assert step.held_bytes == 256 * 2 * 64 * 2
    # All keys and values once; page tables, records, the queries and the step's own tokens beside them.
    assert step.held_bytes < step.read_bytes < 1.4 * step.held_bytes
    assert step.written_bytes < 0.1 * step.held_bytes


def test_decode_is_inspected_from_the_command_line():
    step = ["--decode", "--q-heads", "2", "--kv-heads", "2", "--head-dim", "64", "--tokens", "64"]
    said = json.loads(run(*step, "--json").output)
    assert [kernel["name"] for kernel in said["kernels"]] == ["vector_decode", "finish_step"]
    assert said["read_bytes"] > said["held_bytes"] == 64 * 2 * 2 * 64 * 2
    shown = run(*step)
    assert shown.exit_code == 0
    assert max(map(len, shown.output.splitlines())) <= 80
    assert "decode, float16 in float16, 2/2 heads of 64, 1 behind 64 tokens, sm_80" in shown.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--decode", "--causal", "--lse"], "--decode does not go with --causal, --lse"),
        (["--decode", "--tokens", "100"], "tokens must be a multiple of 64, got 100"),
        (["--decode", "--q-heads", "9"], "q must have a multiple of k's 8 heads, got 9"),
        (["--cc", "7.5"], "cc must be one of 8.0, 8.6, 8.9, 9.0, got 7.5"),
        (["--cc", "sm_80"], "cc must be such as 8.0, got 'sm_80'"),
        (["--algorithm", "v3"], "Invalid value for '--algorithm'"),
        (["--head-dim", "257"], "Invalid value for '--head-dim'"),
    ],
)
def test_what_there_is_not_is_bad_usage(arguments, says):
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in " ".join(result.output.replace("│", " ").split())
