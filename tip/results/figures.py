"""Figures: PNG and SVG, legible in grey (line styles and markers differ, not only colours), axes with units."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams.update(
    {"svg.hashsalt": "tip", "savefig.dpi": 150, "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}
)
import numpy as np  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import LogNorm  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

COLOURS = ("#0b3c5d", "#d1495b", "#328cc1", "#7a9e1f", "#8e44ad", "#e08e0b", "#444444", "#2a9d8f", "#b5651d", "#999999")
QUADRANT_COLOURS = {1: "#CC79A7", 2: "#0072B2", 3: "#D55E00", 4: "#009E73"}  # Okabe and Ito; the same everywhere
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*<>hpd"
Curves = dict[str, tuple[Sequence[float], Sequence[float]]]  # label -> (x values, y values)


@dataclass(frozen=True)
class Bar:
    label: str
    length: float
    error: float  # its standard error; 0: not known
    paper: float | None  # the paper's value


@dataclass(frozen=True)
class ShownToken:
    """A token with the text before it, its numbers (nats), and the five likeliest tokens of both models."""

    quadrant: str
    before: str
    text: str
    entropy: float
    forward_kl: float
    score: float
    student: list[tuple[str, float]]  # text and probability
    teacher: list[tuple[str, float]]


def save(figure: Figure, folder: Path, name: str, caption: str) -> None:
    """Writes folder/name.png and .svg, each whole or not at all, with the caption below the plot."""
    figure.text(0.01, -0.01, caption, va="top", fontsize=7, wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        temporary = folder / f".{name}.tmp.{kind}"
        figure.savefig(temporary, bbox_inches="tight", metadata={"Date": None} if kind == "svg" else {})
        os.replace(temporary, folder / f"{name}.{kind}")
    plt.close(figure)


def style(number: int) -> dict[str, object]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.3,
    }


def lines(panels: Mapping[str, Curves], x_label: str, y_label: str) -> Figure:
    """One panel per title; in it one line per label. The same label looks alike everywhere."""
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.3 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        for label, (x, y) in curves.items():
            every = max(1, len(x) // 12)  # markers on long curves would hide them
            axis.plot(x, y, label=label, markevery=every, **style(labels.index(label)))
        axis.set(title=title, xlabel=x_label, ylabel=y_label)
    handles, names = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=7)
    return figure


def heat_map(matrix: np.ndarray, labels: Sequence[str], title: str) -> Figure:
    """A square matrix of numbers in [0, 1], written into its cells."""
    size = 1.6 + 0.42 * len(labels)
    figure, axis = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = axis.imshow(matrix, cmap="Greys", vmin=0, vmax=1)
    axis.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=7)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.grid(False)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            axis.text(
                j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color="white" if value > 0.6 else "black"
            )
    axis.set_title(title)
    figure.colorbar(image, ax=axis, shrink=0.8)
    return figure


def quadrant_map(h: np.ndarray, d: np.ndarray, thresholds: tuple[float, float]) -> Figure:
    """Token density over entropy and divergence, with the quadrants' borders (TIP's Figure 2, from real tokens)."""
    figure, axis = plt.subplots(figsize=(5.2, 4.2), layout="constrained")
    floor = max(float(np.quantile(d[d > 0], 0.01)) if (d > 0).any() else 1e-8, 1e-8)
    shown = np.maximum(d, floor)
    visible = LogNorm(vmin=0.2)  # a single token is grey, not white: those far out are the ones that matter
    drawn = axis.hexbin(h, shown, gridsize=45, yscale="log", norm=visible, cmap="Greys", mincnt=1)
    axis.set_ylim(shown.min() / 8, shown.max() * 8)  # room for the corners' texts
    axis.axvline(thresholds[0], color="#d1495b", linestyle="--", linewidth=1.2)
    axis.axhline(max(thresholds[1], floor), color="#d1495b", linestyle="--", linewidth=1.2)
    total = d.sum()
    for name, inside, place in (
        ("Q1", (h > thresholds[0]) & (d > thresholds[1]), (0.98, 0.97)),
        ("Q2", (h > thresholds[0]) & (d <= thresholds[1]), (0.98, 0.03)),
        ("Q3", (h <= thresholds[0]) & (d > thresholds[1]), (0.02, 0.97)),
        ("Q4", (h <= thresholds[0]) & (d <= thresholds[1]), (0.02, 0.03)),
    ):
        mass = 100 * d[inside].sum() / total if total > 0 else 0.0
        text = f"{name}: {100 * inside.mean():.1f} % of tokens\n{mass:.1f} % of divergence"
        axis.text(
            *place,
            text,
            transform=axis.transAxes,
            fontsize=7,
            ha="left" if place[0] < 0.5 else "right",
            va="top" if place[1] > 0.5 else "bottom",
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none"},
        )
    axis.set(xlabel="student entropy h = H / ln V", ylabel="divergence d = KL(student || teacher), nats (log)")
    figure.colorbar(drawn, ax=axis, label="tokens")
    return figure


def bars(panels: Mapping[str, Sequence[Bar]], x_label: str, line: str) -> Figure:
    """Horizontal bars, a panel per title, and a dashed line at the bar of the label `line`."""
    longest = max(map(len, panels.values()))
    size = (1.8 + 4.2 * len(panels), 1.2 + 0.27 * longest)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained", sharey=True)
    for axis, (title, shown) in zip(axes.flat, panels.items(), strict=True):
        places = np.arange(len(shown))[::-1]
        lengths, errors = [bar.length for bar in shown], [bar.error for bar in shown]
        axis.barh(places, lengths, xerr=errors, color="#bbbbbb", edgecolor="#333333", linewidth=0.6, capsize=2)
        marked = [(place, bar.paper) for place, bar in zip(places, shown, strict=True) if bar.paper is not None]
        if marked:
            axis.plot([m for _, m in marked], [p for p, _ in marked], "D", color="#d1495b", markersize=5, label="paper")
            axis.legend(fontsize=7)
        for place, bar in zip(places, shown, strict=True):
            axis.text(bar.length + bar.error, place, f" {bar.length:.1f}", va="center", fontsize=7)
        at = next((bar.length for bar in shown if bar.label == line), None)
        if at is not None:
            axis.axvline(at, linestyle="--", color="#d1495b", linewidth=1)
        axis.set_yticks(places, [bar.label for bar in shown], fontsize=7)
        axis.set(title=title, xlabel=x_label)
        axis.margins(x=0.12, y=0.02)
    return figure


def qualitative(tokens: Sequence[ShownToken]) -> Figure:
    """The paper's panel B.5: a row per token."""
    figure, axes = plt.subplots(len(tokens), 3, figsize=(11, 1.55 * len(tokens)), squeeze=False, layout="constrained")
    for (about, *charts), token in zip(axes, tokens, strict=True):
        about.axis("off")
        text = (
            f"{token.quadrant}   ...{token.before} [{token.text}]\n\nentropy {token.entropy:.3f} nats\n"
            f"forward KL {token.forward_kl:.3f} nats\nscore {token.score:.3f}"
        )
        about.text(0, 0.95, text.replace("$", r"\$"), va="top", fontsize=7, family="monospace", wrap=True)
        for axis, who in zip(charts, ("student", "teacher"), strict=True):
            likeliest = token.student if who == "student" else token.teacher
            places = np.arange(len(likeliest))[::-1]
            axis.barh(places, [p for _, p in likeliest], color="#888888" if who == "student" else "#333333")
            axis.set_yticks(
                places, [label.replace("$", r"\$") for label, _ in likeliest], fontsize=7, family="monospace"
            )
            axis.set_xlim(0, 1)
            axis.set_title(f"{who}: five likeliest, probability", fontsize=7)
            axis.tick_params(axis="x", labelsize=6)
    return figure
