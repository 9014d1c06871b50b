"""`numbaflash roofline`: figures of `numbaflash.roofline` as tables, as JSON, or drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from numbaflash.hardware import GPUS, Hardware, find_hardware, measure_this_machine
from numbaflash.roofline import Shape, Workload, conclusion, workloads

DEFAULT_HARDWARE = "A100-40GB-SXM"

_WIDTH = 80


def run(
    *, shape: Shape, hardware: Sequence[str], measure: bool, json: bool, plot: Path | None, bench: Path | None
) -> None:
    """Print what bounds one layer's work, and draw it where asked to.

    Args:
        shape: Of the layer.
        hardware: Names of what it is to run on.
        measure: Whether this machine is one of those to choose from.
        json: Print one JSON object.
        plot: File for the drawing, .svg or .png.
        bench: What `numbaflash bench --json` has printed; None: the last benchmark of this machine, if there is one.

    Raises:
        ValueError: There is no such hardware, a file is not what it should be, or points have no drawing to be in.
        OSError: A file cannot be read or written.
    """
    if bench is not None and plot is None:
        raise ValueError("bench must come with plot, the file to draw its points in")
    known = (measure_this_machine(), *GPUS) if measure else GPUS
    chosen = [find_hardware(name, known) for name in hardware]
    work = workloads(shape)
    if plot is not None:
        from . import roofline_plot  # matplotlib is an extra

        measured = roofline_plot.read_benchmark(bench)
        roofline_plot.save(plot, roofline_plot.draw(f"One layer: {_sizes(shape)}", chosen, work, measured))
    if json:
        print(dumps(_as_json(shape, known, chosen, work)))
        return
    console = Console(width=_WIDTH)
    console.print(_hardware_table(known))
    for one in chosen:
        console.print(_work_table(shape, one, work))
        console.print(conclusion(shape, one) + "\n", highlight=False)
    if plot is not None:
        console.print(f"Drawn in {plot}", highlight=False, soft_wrap=True)


def _as_json(shape: Shape, known: Sequence[Hardware], chosen: Sequence[Hardware], work: Sequence[Workload]) -> object:
    return {
        "shape": asdict(shape),
        "hardware": [asdict(one) | {"ridge": one.ridge} for one in known],
        "workloads": [
            asdict(one) | {"intensity": one.intensity, "bounds": {hw.name: asdict(one.on(hw)) for hw in known}}
            for one in work
        ],
        "conclusions": {one.name: conclusion(shape, one) for one in chosen},
    }


def _hardware_table(known: Sequence[Hardware]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("hardware", no_wrap=True)
    for heading in ("TFLOP/s", "GB/s", "ridge point, FLOP/byte"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in known:
        table.add_row(one.name, *map(_figure, (one.flops / 1e12, one.bandwidth / 1e9, one.ridge)))
    return table


def _work_table(shape: Shape, hardware: Hardware, work: Sequence[Workload]) -> Table:
    table = Table(
        title=f"One layer on {hardware.name}: {_sizes(shape)}",
        title_justify="left",
        caption="attention: every tile comes from memory, none from an L2",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in ("operator", ""):
        table.add_column(heading, no_wrap=True)
    for heading in ("GFLOP", "MB", "FLOP/byte", "bound by", "at least"):
        table.add_column(heading, justify="right", no_wrap=True)
    operator = ""
    for one in work:
        bound = one.on(hardware)
        table.add_row(
            "" if one.operator == operator else one.operator,
            one.variant,
            *map(_figure, (one.operations / 1e9, one.nbytes / 1e6, one.intensity)),
            bound.by,
            _time(bound.seconds),
        )
        operator = one.operator
    return table


def _sizes(shape: Shape) -> str:
    return f"{shape.tokens} tokens, head_dim {shape.head_dim}, batch {shape.batch}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_figure(seconds / size)} {unit}"
    return f"{_figure(seconds / 1e-6)} µs"


def _figure(value: float) -> str:
    """Three digits, more where they stand before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
