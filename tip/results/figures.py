"""The look of the results, colours and type, and their figures: PNG and SVG, in one column that is legible on a phone.

Lines differ in dashes and markers too, so they are legible in grey and for colour-blind readers.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("Agg")
FONT = "DejaVu Sans"  # of figures and pages; it is part of matplotlib
for group, look in {
    "savefig": {"dpi": 170},
    "svg": {"hashsalt": "tip"},
    "font": {"family": FONT, "size": 9},
    "axes": {"titlesize": 9, "titlelocation": "left", "grid": True},
    "axes.spines": {"top": False, "right": False},
    "grid": {"alpha": 0.3},
}.items():
    matplotlib.rc(group, **look)
import numpy as np  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import LogNorm  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from tip.divergences import Divergence  # noqa: E402

COLOURS = ("#000000", "#CC6677", "#332288", "#999933", "#882255", "#117733", "#AA4499")  # of arms, by Paul Tol
QUADRANT_COLOURS = {1: "#CC79A7", 2: "#0072B2", 3: "#D55E00", 4: "#009E73"}  # Okabe and Ito; the same everywhere
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*<>hpd"
WIDTH = 4.8  # inches
Curves = dict[str, dict[float, float]]  # label -> x -> y
Whisker = tuple[str, float, float, float]  # label, mean, and the ends of its interval, which may be infinite
Bar = tuple[str, float, float, float | None]  # label, height, its standard error, and a height to compare with
ShownToken = tuple[
    str, list[tuple[str, float]], list[tuple[str, float]]
]  # text; the student's likeliest, the teacher's


class Album:
    """Saves figures as PNG and SVG in a folder, each whole or not at all, and keeps their captions in order."""

    def __init__(self, out: Path):
        self.out = out
        self.captions: dict[str, str] = {}

    def add(self, figure: Figure, name: str, caption: str) -> None:
        self.captions[name] = caption
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # both files have the layout that has just been computed
        for kind in ("png", "svg"):
            temporary = self.out / f".{name}.tmp.{kind}"
            figure.savefig(temporary, metadata={"Date": None} if kind == "svg" else {})
            os.replace(temporary, self.out / f"{name}.{kind}")
        plt.close(figure)


def style(number: int) -> dict[str, object]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.3,
    }


def lines(panels: Mapping[str, Curves], x_label: str) -> Figure:
    """A panel per title, one above the other; in it one line per label. The same label looks alike everywhere."""
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    looks = {label: style(number) for number, label in enumerate(labels)}
    for quadrant, colour in QUADRANT_COLOURS.items():
        looks.get(f"Q{quadrant}", {})["color"] = colour
    size = (WIDTH, 0.6 + 1.9 * len(panels) + 0.1 * len(labels))
    figure, axes = plt.subplots(len(panels), 1, figsize=size, squeeze=False, layout="constrained", sharex=True)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=True):
        for label, points in curves.items():
            every = max(1, len(points) // 12)  # markers on long curves would hide them
            axis.plot(list(points), list(points.values()), label=label, markevery=every, **looks[label])
        axis.set_title(title)
    axes.flat[-1].set_xlabel(x_label)
    if all(isinstance(x, int) for curves in panels.values() for points in curves.values() for x in points):
        axes.flat[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    drawn = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    columns = min(4, max(1, 60 // (max(map(len, labels)) + 9)))  # as many as fit
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure


def whiskers(series: Mapping[str, Sequence[Whisker]], x_label: str) -> Figure:
    """A row per label with a dot and its interval for each series; the line at 0 is no difference."""
    labels = list(dict.fromkeys(label for rows in series.values() for label, *_ in rows))
    names = [fill(label, 26) for label in labels]
    step = 0.26 if len(series) < 4 else 0.78 / len(series)  # between the dots of a row, in rows
    height = 0.22 + 0.06 * max(0, len(series) - 3)
    size = (WIDTH, 1.0 + sum(height + 0.16 * (1 + name.count("\n")) for name in names))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.axvline(0, color=COLOURS[0], linewidth=0.8)
    for number, (title, rows) in enumerate(series.items()):
        places = [labels.index(label) + step * (number - (len(series) - 1) / 2) for label, *_ in rows]
        means = [mean for _, mean, *_ in rows]
        lengths = [[m - low if math.isfinite(low) else 0.0 for _, m, low, _ in rows]]
        lengths += [[high - m if math.isfinite(high) else 0.0 for _, m, _, high in rows]]
        axis.errorbar(means, places, xerr=lengths, label=title, capsize=2, **style(number) | {"linestyle": ""})
    axis.set_yticks(range(len(labels)), names, fontsize=8)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.grid(False, axis="y")
    axis.set_xlabel(x_label)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def bars(panels: Mapping[str, Sequence[Bar]]) -> Figure:
    """A panel per title, one above the other; in it one lying bar per label, with its standard error."""
    size = (WIDTH, 0.4 + sum(0.5 + 0.2 * len(rows) for rows in panels.values()))
    ratios = [2.5 + len(rows) for rows in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=size, squeeze=False, layout="constrained", gridspec_kw={"height_ratios": ratios}
    )
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=True):
        labels, heights, errors, others = zip(*rows, strict=True)
        places = range(len(rows))
        axis.barh(places, heights, xerr=errors, color=COLOURS[2], alpha=0.75, capsize=2, height=0.7)
        known = [(other, place) for other, place in zip(others, places, strict=True) if other is not None]
        axis.plot([other for other, _ in known], [place for _, place in known], "x", color=COLOURS[1])
        axis.set_yticks(places, labels, fontsize=8)
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlim(0, None)
        axis.grid(False, axis="y")
        axis.set_title(title)
    return figure


def heat_map(matrix: np.ndarray, labels: Sequence[str], title: str) -> Figure:
    """A square matrix of shares, written into its cells in %."""
    figure, axis = plt.subplots(figsize=(WIDTH, WIDTH), layout="constrained")
    axis.imshow(matrix, cmap="Greys", vmin=0, vmax=1)
    axis.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=7)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.grid(False)
    for i, row in enumerate(matrix):
        for j, share in enumerate(row):
            colour = "white" if share > 0.6 else "black"
            axis.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=6.5, color=colour)
    axis.set_title(title)
    return figure


def quadrant_map(
    h: np.ndarray, d: np.ndarray, thresholds: Sequence[float], title: str, divergence: Divergence
) -> Figure:
    """Token density over divergence and entropy, with the borders of the quadrants; `divergence` is what d is.

    It is TIP's Figure 2 from real tokens, turned so that it lies like the picture that explains the quadrants.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    floor = max(float(np.quantile(d[d > 0], 0.01)) if (d > 0).any() else 1e-8, 1e-8)
    shown, border = np.maximum(d, floor), max(thresholds[1], floor)
    visible = LogNorm(vmin=0.2)  # a single token is grey, not white: those far out are the ones that matter
    drawn = axis.hexbin(shown, h, gridsize=45, xscale="log", norm=visible, cmap="Greys", mincnt=1, zorder=2)
    least, most = shown.min() / 3, shown.max() * 3
    bottom, top = h.min() - 0.2 * np.ptp(h) - 0.02, h.max() + 0.2 * np.ptp(h) + 0.02  # room for the corners' texts
    axis.set(xlim=(least, most), ylim=(bottom, top))
    total = d.sum()
    for q, colour in QUADRANT_COLOURS.items():
        above, right = q in (1, 2), q in (1, 3)
        inside = ((h > thresholds[0]) == above) & ((d > thresholds[1]) == right)
        mass = 100 * d[inside].sum() / total if total > 0 else 0.0
        across = (border, most) if right else (least, border)
        along = (thresholds[0], top) if above else (bottom, thresholds[0])
        axis.fill_between(across, *along, color=colour, alpha=0.25, linewidth=0, zorder=1)
        axis.text(
            0.98 if right else 0.02,
            0.98 if above else 0.02,
            f"Q{q}: {100 * inside.mean():.1f} % of tokens\n{mass:.1f} % of divergence",
            transform=axis.transAxes,
            fontsize=8,
            ha="right" if right else "left",
            va="top" if above else "bottom",
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
            zorder=3,
        )
    unit = f", {divergence.unit}" if divergence.unit else ""
    axis.set(xlabel=f"divergence d = {divergence.formula}{unit} (log)", ylabel="student entropy h = H / ln V")
    axis.set_title(title)
    figure.colorbar(drawn, ax=axis, label="tokens", location="bottom", shrink=0.6, aspect=40)
    return figure


def qualitative(tokens: Sequence[ShownToken], title: str) -> Figure:
    """The paper's panel B.5: for each token its text and numbers, and below them what both models expect."""
    figure = plt.figure(figsize=(WIDTH, 0.3 + 1.9 * len(tokens)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    parts = figure.subfigures(len(tokens), 1, squeeze=False)[:, 0]
    for part, (about, *likeliest) in zip(parts, tokens, strict=True):
        part.suptitle(about.replace("$", r"\$"), x=0.01, ha="left", fontsize=8)
        for number, (axis, shares) in enumerate(zip(part.subplots(1, 2), likeliest, strict=True)):
            places = np.arange(len(shares))[::-1]
            axis.barh(places, [share for _, share in shares], color=COLOURS[2 - number])
            names = [text.replace("$", r"\$") for text, _ in shares]
            axis.set_yticks(places, names, fontsize=8, family="monospace")
            axis.set_xlim(0, 1)
            axis.set_title(f"{('student', 'teacher')[number]}, probability", fontsize=8)
            axis.tick_params(axis="x", labelsize=7)
    return figure
