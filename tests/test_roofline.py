"""What bounds attention: the arithmetic, the command that prints it, and the drawing."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from typer.testing import CliRunner

from numbaflash import RingKVCache
from numbaflash.cuda.traffic import flash_v1_bytes, flash_v2_bytes, standard_bytes
from numbaflash.hardware import GPUS, THIS_MACHINE, Hardware, find_hardware, measure_this_machine
from numbaflash.roofline import Shape, Workload, conclusion, decode, prefill, projection, scores, workloads
from numbaflash_service import bench
from numbaflash_service.cli import app
from numbaflash_service.roofline_plot import draw, read_benchmark

# Operations per byte of QK^T with its scores written out, for N tokens and head dim d, on a card of 201 FLOP/byte.
SCORES_WRITTEN = {
    (256, 64): 43,
    (2048, 64): 60,
    (4096, 64): 62,
    (256, 128): 64,
    (2048, 128): 114,
    (4096, 128): 120,
    (256, 256): 85,
    (2048, 256): 205,
    (4096, 256): 228,
}
A100 = find_hardware("A100-40GB-SXM")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["roofline", "--no-measure", *arguments])


def said(result: Any) -> str:
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(("size", "figure"), SCORES_WRITTEN.items())
def test_written_scores_have_the_operations_per_byte_of_the_known_table(size: tuple[int, int], figure: int) -> None:
    work = scores(*size, written=True)
    assert round(work.intensity) == figure
    assert work.on(A100).by == ("compute" if figure > 201 else "memory")


def test_scores_that_stay_on_the_chip_have_half_an_operation_per_byte_for_each_token() -> None:
    assert scores(4096, 128, written=False).intensity == 2048


def test_an_a100_with_40_gb_has_201_operations_per_byte() -> None:
    assert round(A100.ridge) == 201


def test_a_square_product_has_a_third_of_its_side() -> None:
    assert projection(3000, 3000, 3000, "").intensity == pytest.approx(1000)


@given(st.integers(1, 10**15), st.integers(1, 10**15), st.floats(1.0, 1e16), st.floats(1.0, 1e16))
def test_the_bound_is_the_longer_time_and_changes_at_the_ridge(
    operations: int, nbytes: int, flops: float, bandwidth: float
) -> None:
    machine, work = Hardware("any", flops, bandwidth, 1), Workload("", "", operations, nbytes)
    bound = work.on(machine)
    assert bound.seconds == max(operations / flops, nbytes / bandwidth)
    if work.intensity > machine.ridge * (1 + 1e-9):
        assert bound.by == "compute"
    if work.intensity < machine.ridge * (1 - 1e-9):
        assert bound.by == "memory"


def test_algorithms_move_what_the_kernels_are_known_to_move() -> None:
    rows = {
        one.variant: one for one in workloads(Shape(tokens=512, q_heads=4, kv_heads=2)) if one.operator == "attention"
    }
    for name, moved in (("standard", standard_bytes), ("V1", flash_v1_bytes), ("V2", flash_v2_bytes)):
        assert rows[name].nbytes == 4 * moved(512, 128)
        assert rows[name].operations == 4 * (4 * 512 * 512 * 128)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_decode_reads_the_pages_of_a_full_cache(dtype: str) -> None:
    pages = RingKVCache(1, 2, 64, capacity=512, dtype=dtype).pools[-1]
    q_and_out = 2 * 8 * 64 * 2
    assert decode(512, 8, 2, 64, dtype).nbytes == 512 // 64 * pages.page_nbytes + q_and_out


def test_a_causal_prompt_has_half_the_operations_and_as_many_bytes() -> None:
    whole, half = (prefill(1024, 8, 2, 64, causal=causal) for causal in (False, True))
    assert (whole.operations, whole.nbytes) == (2 * half.operations, half.nbytes)


def test_heads_and_sequences_multiply_work_and_leave_its_intensity() -> None:
    one, many = (workloads(Shape(tokens=256, q_heads=8, kv_heads=8, batch=batch)) for batch in (1, 3))
    for a, b in zip(one, many, strict=True):
        if a.operator != "QKV projection":  # its weights are read once
            assert (3 * a.operations, 3 * a.nbytes) == (b.operations, b.nbytes)


def test_the_conclusion_names_bounds_and_gain() -> None:
    sentence = conclusion(Shape(), A100)
    assert "ridge point 201" in sentence
    assert "prefill with 32/8 heads has 1638 FLOP/byte and waits for arithmetic" in sentence
    assert "int4 can make it 3.5 times as fast" in sentence


def test_this_machine_is_measured() -> None:
    machine = measure_this_machine()
    assert 1e8 < machine.flops < 1e14
    assert 1e8 < machine.bandwidth < 1e13


def test_the_table_names_every_operator_and_fits_80_columns() -> None:
    result = run("--hardware", "l4", "--hardware", "RTX-4090")
    assert result.exit_code == 0
    for name in (*(gpu.name for gpu in GPUS), "QKV projection", "standard", "V1", "V2", "prefill", "MHA", "GQA", "MQA"):
        assert name in result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert "…" not in result.output
    assert "On RTX-4090 (ridge point 164 FLOP/byte)" in said(result)


def test_json_has_all_hardware_and_workloads() -> None:
    figures = json.loads(run("--json", "--tokens", "2048", "--head-dim", "64").output)
    assert [one["name"] for one in figures["hardware"]] == [gpu.name for gpu in GPUS]
    written = next(one for one in figures["workloads"] if one["variant"] == "written")
    assert round(written["intensity"]) == 60
    assert written["bounds"]["A100-40GB-SXM"]["by"] == "memory"
    assert figures["shape"]["tokens"] == 2048


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--hardware", "A100"], "hardware must be one of A100-40GB-SXM, A100-40GB-PCIe"),
        (["--tokens", "1000"], "tokens must be a multiple of 256, got 1000"),
        (["--head-dim", "80"], "head_dim must be a multiple of 32, at most 256; got 80"),
        (["--q-heads", "0"], "q_heads must be at least 1, got 0"),
        (["--kv-heads", "5"], "q_heads must be a multiple of kv_heads (5), got 32"),
        (["--bench", "bench.json"], "bench must come with plot"),
        (["--plot", "roof.pdf"], "plot must be a file ending in .svg or .png, got 'roof.pdf'"),
        (["--plot", "roof.svg", "--bench", __file__], "bench must be what `numbaflash bench --json` prints"),
    ],
)
def test_what_there_is_not_is_bad_usage(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert says in said(result)


MACHINE = Hardware(THIS_MACHINE, 3e11, 5e10, 1 << 34)


def benchmark_result(path: Path) -> Path:
    rows = [
        {"operator": "prefill", "dtype": "float16", "intensity": 512.0, "flops": 2e11},
        {"operator": "decode GQA 32/8", "dtype": "bfloat16", "intensity": 4.0, "flops": 4e10},
    ]
    result = {"machine": {"cpu": "Some CPU"}, "date": "2026-11-25", "hardware": asdict(MACHINE), "rows": rows}
    path.write_text(json.dumps(result))
    return path


@pytest.mark.parametrize(("name", "magic"), [("roof.svg", b"<?xml"), ("roof.png", b"\x89PNG")])
def test_a_drawing_is_written_with_the_points_of_a_benchmark(name: str, magic: bytes, tmp_path: Path) -> None:
    file, points = tmp_path / name, benchmark_result(tmp_path / "bench.json")
    result = run("--plot", str(file), "--bench", str(points))
    assert result.exit_code == 0
    assert file.read_bytes().startswith(magic)


def test_a_drawing_that_cannot_be_written_is_status_1(tmp_path: Path) -> None:
    result = run("--plot", str(tmp_path / "no" / "such.svg"))
    assert result.exit_code == 1
    assert "No such file" in result.output


@pytest.mark.parametrize("tokens", [256, 4096, 65536])
@pytest.mark.parametrize("roofs", [GPUS[:1], GPUS], ids=["one roof", "all roofs"])
def test_no_label_of_a_drawing_lies_on_another(
    tokens: int, roofs: tuple[Hardware, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = read_benchmark(benchmark_result(tmp_path / "bench.json"))
    figure = draw("One layer", roofs, workloads(Shape(tokens=tokens)), measured)
    drawn: dict[Text, Any] = {}
    draw_text = Text.draw

    def record(text: Text, renderer: Any) -> None:
        draw_text(text, renderer)
        if text.get_visible() and text.get_text().strip():
            drawn[text] = text.get_window_extent(renderer)

    monkeypatch.setattr(Text, "draw", record)
    figure.savefig(tmp_path / "roof.png")
    assert len(drawn) > 30
    for (first, a), (second, b) in combinations(drawn.items(), 2):
        assert not a.overlaps(b), (first.get_text(), second.get_text())
    for text, box in drawn.items():
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, text.get_text()


def test_the_last_benchmark_is_kept_for_the_drawing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBAFLASH_CACHE_DIR", str(tmp_path / "cache"))
    assert read_benchmark(None) is None
    row = bench.Row("decode GQA 32/8", "float16", "pages", 4.0, "GB/s", 10.0, "plain read", 20.0, 0.5)
    monkeypatch.setattr(bench, "prefill_rows", lambda _: iter(()))
    monkeypatch.setattr(bench, "decode_rows", lambda _: iter((row,)))
    monkeypatch.setattr(bench, "measure_this_machine", lambda: MACHINE)
    printed = CliRunner().invoke(app, ["bench", "--json"])
    assert json.loads(printed.output) == json.loads(bench.last_result().read_text())
    measured = read_benchmark(None)
    assert measured is not None
    assert measured.points == [("decode GQA 32/8", "float16", 4.0, 4e10)]
    assert measured.roof == MACHINE


def test_a_benchmark_that_cannot_be_kept_is_printed_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBAFLASH_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(bench, "prefill_rows", lambda _: iter(()))
    monkeypatch.setattr(bench, "decode_rows", lambda _: iter(()))
    monkeypatch.setattr(bench, "measure_this_machine", lambda: MACHINE)
    printed = CliRunner().invoke(app, ["bench", "--json"])
    assert printed.exit_code == 0
    assert json.loads(printed.stdout)["rows"] == []
    assert "The figures are not kept" in printed.stderr
