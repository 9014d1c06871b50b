"""The roofline as a drawing: above, what machines can do and what a benchmark has reached; below, what there is to do.

Both halves share the axis of FLOP/byte, so that a workload stands under the part of the roofs that it reaches, and the
lines of the ridge points part what memory bounds from what arithmetic bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from json import JSONDecodeError, loads
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from numbaflash.hardware import Hardware
from numbaflash.roofline import Workload

from .bench import last_result

SUFFIXES = (".svg", ".png")

# Okabe and Ito's colours, told apart by colour-blind readers as well; then once more, dashed.
_LINES = [
    (colour, style) for style in ("-", "--") for colour in ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
]
_MARKERS = "osD^vP"
_FILLS = ("white", "#999999", "black")


@dataclass(frozen=True)
class Measured:
    """What a benchmark has found.

    Attributes:
        machine: Its processor.
        date: When.
        roof: What that machine could do then.
        points: (operator, dtype, FLOP/byte, FLOP/s) each.
    """

    machine: str
    date: str
    roof: Hardware
    points: Sequence[tuple[str, str, float, float]]


def read_benchmark(path: Path | None) -> Measured | None:
    """Read what `numbaflash bench --json` has printed; without a path the last benchmark, None where there is none.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds something else.
    """
    source = path or last_result()
    if path is None and not source.exists():
        return None
    try:
        result: dict[str, Any] = loads(source.read_text())
        points = [(row["operator"], row["dtype"], row["intensity"], row["flops"]) for row in result["rows"]]
        return Measured(result["machine"]["cpu"], result["date"], Hardware(**result["hardware"]), points)
    except (JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"bench must be what `numbaflash bench --json` prints; {source} is not ({error!r})") from None


def save(path: Path, figure: Figure) -> None:
    """Write a drawing to a file.

    Raises:
        ValueError: The file is none of `SUFFIXES`.
        OSError: It cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"plot must be a file ending in {' or '.join(SUFFIXES)}, got {path.name!r}")
    figure.savefig(path, dpi=150)


def draw(title: str, hardware: Sequence[Hardware], work: Sequence[Workload], measured: Measured | None) -> Figure:
    """Draw the roofs of hardware, workloads, and what was measured under the roof that was measured with it."""
    if measured is not None:
        hardware = [measured.roof, *(one for one in hardware if one.name != measured.roof.name)]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 9.5), layout="constrained")
        figure.suptitle(
            f"{title}\nLeft of a machine's ridge, the dotted line, memory is the bound; right of it, compute"
        )
        lanes = list(dict.fromkeys(one.operator for one in work))
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(8, len(lanes)))
        known = [one.intensity for one in work] + [one.ridge for one in hardware]
        above.set(xscale="log", yscale="log", xlim=(min(known) / 2, max(known) * 4), ylabel="FLOP/s")
        roofs = _draw_roofs(above, below, hardware)
        points = _draw_points(above, measured) if measured is not None else []
        above.legend(handles=[*roofs, *points], loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        _draw_workloads(below, lanes, work)
        return figure


def _draw_roofs(above: Axes, below: Axes, hardware: Sequence[Hardware]) -> list[Line2D]:
    """Draw each roof and its ridge; return what the legend is to show."""
    low, high = above.get_xlim()
    handles = []
    for (colour, style), one in zip(_LINES * len(hardware), hardware, strict=False):
        label = (
            f"{one.name}\n{_with_unit(one.flops, 'FLOP/s')}, {_with_unit(one.bandwidth, 'B/s')}, ridge {one.ridge:.0f}"
        )
        roof = [low * one.bandwidth, one.flops, one.flops]
        handles += above.plot([low, one.ridge, high], roof, color=colour, linestyle=style, linewidth=2, label=label)
        for axes in (above, below):
            axes.axvline(one.ridge, color=colour, linestyle=":", linewidth=1, zorder=0)
    return handles


def _draw_points(axes: Axes, measured: Measured) -> list[Line2D]:
    """Draw what was measured, operators by shape and dtypes by fill; return what the legend is to show."""
    operators = list(dict.fromkeys(point[0] for point in measured.points))
    dtypes = list(dict.fromkeys(point[1] for point in measured.points))
    markers = dict(zip(operators, _MARKERS * len(operators), strict=False))
    fills = dict(zip(dtypes, _FILLS * len(dtypes), strict=False))

    def point(x: Sequence[float], y: Sequence[float], marker: str, fill: str, label: str = "") -> Line2D:
        (line,) = axes.plot(x, y, marker, mfc=fill, mec="black", mew=0.7, markersize=6, label=label)
        return line

    for operator, dtype, intensity, flops in measured.points:
        point([intensity], [flops], markers[operator], fills[dtype])
    heading = Line2D([], [], linestyle="", label=f"\nmeasured {measured.date}\n{measured.machine}")
    shapes = [point([], [], markers[name], _FILLS[1], name) for name in operators]
    return [heading, *shapes, *(point([], [], "o", fills[name], name) for name in dtypes)]


def _draw_workloads(axes: Axes, lanes: Sequence[str], work: Sequence[Workload]) -> None:
    axes.set(xlabel="FLOP/byte", ylim=(len(lanes) - 0.3, -0.8))
    axes.set_yticks(range(len(lanes)), lanes)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="#EEEEEE")
    background = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for lane, operator in enumerate(lanes):
        of_lane = sorted((one for one in work if one.operator == operator), key=lambda one: one.intensity)
        for number, one in enumerate(of_lane):
            axes.plot(one.intensity, lane, "o", color="black", markersize=4)
            # Neighbours may be near: one has its label above, the next one below.
            label = axes.annotate(one.variant, (one.intensity, lane), (0, -13 if number % 2 else 5), fontsize=8)
            label.set(ha="center", anncoords="offset points", bbox=background)


def _with_unit(value: float, unit: str) -> str:
    prefix, size = ("T", 1e12) if value >= 1e12 else ("G", 1e9)
    return f"{value / size:.3g} {prefix}{unit}"
