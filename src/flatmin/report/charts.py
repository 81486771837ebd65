"""Charts as SVG that takes its colours from the page, so that one drawing serves light and dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Colours that stand for the page's: matplotlib writes them, `_svg` replaces them by CSS.
INK, GRID = "#000001", "#000002"
SERIES = {"extract": "#000011", "finetune": "#000012", "control": "#000013", "sam": "#000014"}
_CSS = {INK: "currentColor", GRID: "var(--grid)", **{color: f"var(--{name})" for name, color in SERIES.items()}}
MARKERS = {"extract": "D", "finetune": "o", "control": "s", "sam": "^"}
STYLES = ("-", "--", ":", "-.")
LABELS = {"extract": "frozen", "finetune": "fine-tuned", "control": "control", "sam": "SAM"}
WIDTH, HEIGHT = 4.8, 3.1  # inches, 72 units of the drawing each: it is read at about that many pixels
_DROP = re.compile(r'<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->| id="[\w.]+_\d+"', re.DOTALL)

Points = Sequence[tuple[float, float]]


class Chart:
    """One chart. `axes` is drawn on within `chart`; `svg` is there afterwards."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.svg = Markup()


@contextmanager
def chart(name: str, alt: str, x: str, y: str, height: float = HEIGHT) -> Iterator[Chart]:
    """Draw a chart: the block draws on its axes.

    Args:
        name: of letters, and of no other chart on the page; identifiers in the drawing follow from it.
        alt: what the chart shows, in words. x, y: the titles of the axes.
        height: in inches.
    """
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # text in the page's font
        "svg.hashsalt": name,
        "font.size": 10.5,
        "text.color": INK,
        "text.parse_math": False,
        "axes.edgecolor": GRID,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "xtick.color": INK,
        "ytick.color": INK,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "lines.linewidth": 1.8,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        drawing = Chart(figure.subplots())
        drawing.axes.set_xlabel(x)
        drawing.axes.set_ylabel(y)
        drawing.axes.xaxis.set_major_locator(MaxNLocator(6))
        yield drawing
        drawing.svg = _svg(figure, alt)


def _svg(figure: Figure, alt: str) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = _DROP.sub("", buffer.getvalue())
    for color, css in _CSS.items():
        text = text.replace(color, css)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    width, height = (72 * side for side in figure.get_size_inches())
    start = f'<svg role="img" aria-label="{html.escape(alt)}" viewBox="0 0 {width:g} {height:g}"'
    text = re.sub(r"<svg\b[^>]*>", f'{start} xmlns:xlink="http://www.w3.org/1999/xlink">', text, count=1)
    return Markup(re.sub(r"\n\s*", "\n", text.strip()))  # noqa: S704 - matplotlib escapes its texts


def dots(name: str, alt: str, rows: Sequence[tuple[str, str, Sequence[float], float]], x: str) -> Markup:
    """A row for each method: a dot for each seed, and the mean as a line. rows: label, series, values, mean."""
    with chart(name, alt, x, "", 0.9 + 0.45 * len(rows)) as drawing:
        for place, (_, series, values, mean) in enumerate(rows):
            color = SERIES[series]
            drawing.axes.plot([mean, mean], [place - 0.3, place + 0.3], color=color, linewidth=2.5)
            heights = place + np.linspace(-0.3, 0.3, len(values) + 2)[1:-1]  # so that equal ones are seen, too
            drawing.axes.plot(values, heights, MARKERS[series], color=color, markersize=7, alpha=0.75, linewidth=0)
        _rows(drawing.axes, [row[0] for row in rows])
    return drawing.svg


def intervals(name: str, alt: str, rows: Sequence[tuple[Any, ...]]) -> Markup:
    """A row for each difference, in points: the interval as a bar, the mean, and a dot for each seed.

    rows: label, series, each seed's difference, their mean, and the interval's ends.
    """
    with chart(name, alt, "difference in test accuracy, points", "", 0.9 + 0.6 * len(rows)) as drawing:
        drawing.axes.axvline(0, color=INK, linewidth=1)
        for place, (_, series, values, mean, low, high) in enumerate(rows):
            color = SERIES[series]
            drawing.axes.plot([low, high], [place, place], color=color, linewidth=9, alpha=0.3, solid_capstyle="butt")
            drawing.axes.plot([mean, mean], [place - 0.25, place + 0.25], color=color, linewidth=2.5)
            heights = place + np.linspace(-0.3, 0.3, len(values) + 2)[1:-1]  # so that equal ones are seen, too
            drawing.axes.plot(values, heights, "o", color=color, markersize=6, linewidth=0)
        _rows(drawing.axes, [row[0] for row in rows])
    return drawing.svg


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.08)


def lines(
    name: str,
    alt: str,
    x: str,
    y: str,
    series: Mapping[str, Sequence[Points]],
    limits: tuple[float, float] | None = None,
) -> Markup:
    """Curves: for each series, which is a method or any label, several in one colour. limits: of the y axis."""
    with chart(name, alt, x, y) as drawing:
        for number, (key, curves) in enumerate(series.items()):
            style = list(SERIES).index(key) if key in SERIES else number
            for index, points in enumerate(curves):
                drawing.axes.plot(
                    *np.array(points).reshape(-1, 2).T,
                    color=list(SERIES.values())[style % len(SERIES)],
                    linestyle=STYLES[style % len(STYLES)],
                    alpha=1 if len(curves) == 1 else 0.75,
                    label=LABELS.get(key, key) if index == 0 else None,
                )
        if limits:
            drawing.axes.set_ylim(*limits)
        drawing.axes.legend()
    return drawing.svg


def scatter(name: str, alt: str, x: str, y: str, points: Sequence[tuple[str, float, float, bool]]) -> Markup:
    """Named points, of which the chosen ones are filled. points: label, x, y, chosen."""
    with chart(name, alt, x, y) as drawing:
        color = SERIES["finetune"]
        for label, across, up, chosen in points:
            drawing.axes.plot(across, up, "o", color=color, markersize=9, fillstyle="full" if chosen else "none")
            drawing.axes.annotate(
                label + (" (chosen)" if chosen else ""),
                (across, up),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                fontsize=9.5,
            )
        drawing.axes.margins(x=0.3, y=0.25)
    return drawing.svg


def reliability(name: str, alt: str, series: Mapping[str, Sequence[tuple[float, float, float]]]) -> Markup:
    """Accuracy against confidence, in percent: by label, confidence, accuracy and the share of images of each bin."""
    with chart(name, alt, "confidence, %", "accuracy, %") as drawing:
        drawing.axes.plot([0, 100], [0, 100], color=INK, linewidth=1, linestyle=":", label="as right as it says")
        for (label, bins), key in zip(series.items(), ("extract", "finetune"), strict=True):
            confidence, accuracy, share = np.array(bins).T
            drawing.axes.plot(confidence, accuracy, color=SERIES[key], linewidth=1.2, alpha=0.7)
            drawing.axes.scatter(
                confidence, accuracy, 14 + 1.2 * share, color=SERIES[key], marker=MARKERS[key], label=label, alpha=0.85
            )
        drawing.axes.set(xlim=(0, 102), ylim=(0, 104))
        drawing.axes.legend(markerscale=0.8)
    return drawing.svg


def heat_map(name: str, alt: str, matrix: np.ndarray) -> Markup:
    """A confusion matrix, int [classes, classes] by actual and predicted, each row as a share of its images."""
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    pixels = np.zeros((*matrix.shape, 4))
    pixels[...] = (0.0, 0.45, 0.7, 0.0)
    pixels[..., 3] = np.sqrt(shares)
    with chart(name, alt, "predicted class, by number", "actual class, by number", 4.6) as drawing:
        drawing.axes.grid(visible=False)
        drawing.axes.imshow(pixels, interpolation="nearest")
    return drawing.svg
