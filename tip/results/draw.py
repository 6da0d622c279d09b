"""The figures of a comparison, as far as its runs allow them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd.compare import METRICS
from opd.files import step_number
from opd.record import dump
from opd.record.metrics import read_metrics
from tip.results import figures
from tip.results.collect import curve
from tip.results.figures import Bar, Curves, ShownToken
from tip.results.types import Accuracy, ArmResult, Results

MANY = 9  # lines in one plot
QUADRANTS = (1, 2, 3, 4)


class Album:
    """Saves figures as PNG and SVG in a folder and keeps their captions, in the order of the page."""

    def __init__(self, out: Path, about: str):
        self.out = out
        self.about = about
        self.captions: dict[str, str] = {}

    def add(self, figure: figures.Figure, name: str, text: str) -> None:
        self.captions[name] = f"{text} {self.about}."
        figures.save(figure, self.out, name, self.captions[name])


def draw(results: Results, out: Path) -> dict[str, str]:
    """Figures in `out`; returns name -> caption, in the order of the page."""
    comparison, seeds = results.comparison, results.comparison.seeds
    about = (
        f"pair {comparison.pair}, seeds {', '.join(map(str, seeds))} (n = {len(seeds)}), commit {results.git_commit}"
    )
    album = Album(out, f"{comparison.title}; {about}")
    benchmarks = next(iter(results.arms.values())).last
    if not benchmarks:
        return album.captions
    metric = "mean_at_k" if all("mean_at_k" in e.accuracies for e in benchmarks.values()) else "greedy"  # as the paper
    sampled = f"mean@{next(iter(benchmarks.values())).k}" if metric == "mean_at_k" else METRICS[metric]
    marks = " Diamonds: the paper's values." if comparison.paper else ""
    base = comparison.baselines[0]
    album.add(
        figures.bars({name: _bars(results, name, metric) for name in benchmarks}, f"accuracy ({sampled}), %", base),
        "accuracy",
        f"Accuracy after the last update; bars: standard error over seeds; dashed: {base}.{marks}",
    )
    if any(arm.retained < 1 for arm in results.arms.values()):
        album.add(
            figures.lines(_against_retention(results, list(benchmarks), metric), "tokens kept, share", ""),
            "retention",
            f"Retention against accuracy ({sampled}, %), covered divergence, peak memory, time."
            f"{results.memory_note}{marks}",
        )
    shown = _shown(results)
    album.add(
        figures.lines(_training(results, shown, list(benchmarks), metric), "update", ""),
        "training",
        f"Accuracy ({sampled}, %) at the evaluated updates, loss and divergence while training; means over seeds.",
    )
    quadrants = _quadrants(results, shown[:2])
    if all(x for panel in quadrants.values() for x, _ in panel.values()):
        album.add(figures.lines(quadrants, "update", "share"), "quadrants_while_training", "Quadrants while training.")
    first_run = next(iter(results.folders[shown[0]].values()))
    dumps = _first_dump(first_run)
    if dumps and "quadrant" in dumps[0]:
        _draw_tokens(dumps, _thresholds(first_run, dumps[0]["step"]), album)
    return album.captions


def _final(arm: ArmResult, name: str, metric: str) -> Accuracy | None:
    return arm.last[name].accuracies.get(metric) if name in arm.last else None


def _bars(results: Results, name: str, metric: str) -> list[Bar]:
    accuracies = {label: _final(arm, name, metric) for label, arm in results.arms.items()}
    return [
        Bar(
            label,
            100 * accuracy.mean,
            100 * (accuracy.se_seeds or 0.0),
            results.arms[label].paper.get(name, [None])[0],
        )
        for label, accuracy in accuracies.items()
        if accuracy is not None
    ]


def families(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Rule with its other settings -> labels of its arms by falling retention.

    A family starts from the arm of all tokens under the same loss, where there is one.
    """
    all_tokens = {_loss(chosen): [label] for label, chosen in settings.items() if chosen.get("tip.rule") == "all"}
    members: dict[str, list[str]] = {}
    for label, chosen in settings.items():
        if "tip.retention" in chosen and chosen["tip.rule"] != "all":
            rest = [f"{k.rpartition('.')[2]}={v}" for k, v in chosen.items() if k not in ("tip.rule", "tip.retention")]
            members.setdefault(" ".join([chosen["tip.rule"], *rest]), []).append(label)
    return {
        family: all_tokens.get(_loss(settings[labels[0]]), [])
        + sorted(labels, key=lambda label: -settings[label]["tip.retention"])
        for family, labels in members.items()
    }


def _loss(settings: Mapping[str, Any]) -> tuple[str | None, str]:
    """What decides an arm's loss: the divergence it sets, and its mixture (the rule's own where it sets none)."""
    mixture_of_rule = "total_variation" if settings.get("tip.rule") == "total_variation" else "none"
    return settings.get("loss.divergence"), settings.get("tip.mixture") or mixture_of_rule


def _against_retention(results: Results, benchmarks: Sequence[str], metric: str) -> dict[str, Curves]:
    settings = {label: results.comparison.settings[label] for label in results.arms}
    arms_of = {family: [results.arms[a] for a in labels] for family, labels in families(settings).items()}
    panels: dict[str, Curves] = {}
    for name in benchmarks:
        curves = panels[f"accuracy, {name}, %"] = {}
        for family, arms in arms_of.items():
            accuracies = [(arm.retained, _final(arm, name, metric)) for arm in arms]
            curves[family] = _curve((retained, 100 * a.mean) for retained, a in accuracies if a is not None)
            in_paper = _curve((arm.retained, arm.paper[name][0]) for arm in arms if name in arm.paper)
            if in_paper[0]:
                curves[f"{family} (paper)"] = in_paper
    for title, height in (
        ("divergence covered, share", lambda arm: 1.0 if arm.mass_covered is None else arm.mass_covered),
        ("peak memory, GiB", lambda arm: arm.peak_memory_gb),
        ("time of all updates, s", lambda arm: arm.seconds),
    ):
        panels[title] = {f: _curve((arm.retained, height(arm)) for arm in arms) for f, arms in arms_of.items()}
    return panels


def _curve(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    pairs = list(points)
    return [x for x, _ in pairs], [y for _, y in pairs]


def _shown(results: Results) -> list[str]:
    """Arms for plots over time: those of the first panel, then the first of each other, as many as stay legible."""
    first, *others = ([a for a in panel.arms if a in results.arms] for panel in results.comparison.panels)
    return list(dict.fromkeys([*first, *(panel[0] for panel in others if panel)]))[:MANY] or list(results.arms)[:MANY]


def _training(results: Results, shown: Sequence[str], benchmarks: Sequence[str], metric: str) -> dict[str, Curves]:
    panels: dict[str, Curves] = {}
    for name in benchmarks:
        curves = panels[f"accuracy, {name}, %"] = {}
        for label in shown:
            by_step = {0: results.step_0_student} | results.arms[label].evaluations
            accuracies = [(step, e[name].accuracies.get(metric)) for step, e in by_step.items() if name in e]
            curves[label] = _curve((step, 100 * a.mean) for step, a in accuracies if a is not None)
    for title, key in (
        ("loss of the kept tokens, nats", "loss/divergence"),
        ("reverse KL of all tokens, nats", "divergence/reverse_kl"),
    ):
        panels[title] = {label: curve(results.folders[label], key) for label in shown}
    return panels


def _quadrants(results: Results, labels: Sequence[str]) -> dict[str, Curves]:
    return {
        f"{what}: {label}": {f"Q{q}": curve(results.folders[label], f"tip/{key}_q{q}") for q in QUADRANTS}
        for label in labels
        for what, key in (("share of tokens", "share"), ("share of divergence", "mass"))
    }


def _first_dump(run_dir: Path) -> list[dict[str, Any]]:
    """The dumped rollouts of a run's first dumped update."""
    paths = sorted(path for path in (run_dir / "tokens").glob("step_*.jsonl") if step_number(path) is not None)
    return dump.read(paths[0]) if paths else []


def _thresholds(run_dir: Path, step: int) -> tuple[float, float] | None:
    """Of the quadrants at an update, if they were logged."""
    row = next((row for row in read_metrics(run_dir) if row["step"] == step), {})
    names = ("tip/threshold_entropy", "tip/threshold_divergence")
    return (row[names[0]], row[names[1]]) if set(names) <= set(row) else None


def _draw_tokens(dumps: Sequence[dict[str, Any]], thresholds: tuple[float, float] | None, album: Album) -> None:
    """The quadrant map, the overlap of rules and the qualitative panel."""
    count = sum(len(rollout["token_ids"]) for rollout in dumps)
    about = f"Update {dumps[0]['step']}, {len(dumps)} rollouts, {count} tokens."

    def column(name: str) -> np.ndarray:
        return np.array([number for rollout in dumps for number in rollout[name]])

    if thresholds is not None:
        entropy = column("student_entropy") / math.log(dumps[0]["vocab_size"])
        drawn = figures.quadrant_map(entropy, column("reverse_kl"), thresholds)
        album.add(drawn, "quadrants", f"Token density; dashed: the thresholds. {about}")
    keeps = {name.removeprefix("keep/"): column(name).astype(bool) for name in dumps[0] if name.endswith("@0.2")}
    if keeps:
        matrix = np.array([[(a & b).sum() / max((a | b).sum(), 1) for b in keeps.values()] for a in keeps.values()])
        labels = [name.partition("@")[0] for name in keeps]
        album.add(figures.heat_map(matrix, labels, "Jaccard overlap at retention 0.2"), "overlap", about)
    chosen = [_token_of(dumps, quadrant) for quadrant in QUADRANTS]
    drawn = figures.qualitative([token for token in chosen if token is not None])
    album.add(drawn, "tokens", f"The token of highest divergence in each quadrant. {about}")


def _token_of(dumps: Sequence[dict[str, Any]], quadrant: int) -> ShownToken | None:
    """The token of highest divergence in a quadrant; None where the quadrant is empty."""
    places = [
        (rollout["reverse_kl"][i], n, i)
        for n, rollout in enumerate(dumps)
        for i, at in enumerate(rollout["quadrant"])
        if at == quadrant
    ]
    if not places:
        return None
    _, n, i = max(places)
    rollout = dumps[n]
    return ShownToken(
        quadrant=f"Q{quadrant}",
        before="".join(rollout["tokens"][max(0, i - 7) : i])[-40:].replace("\n", "\\n"),
        text=rollout["tokens"][i].replace("\n", "\\n"),
        entropy=rollout["student_entropy"][i],
        forward_kl=rollout["forward_kl"][i],
        score=rollout["score"][i],
        student=[(repr(text)[1:-1], share) for text, share in rollout["student_top5"][i]],
        teacher=[(repr(text)[1:-1], share) for text, share in rollout["teacher_top5"][i]],
    )
