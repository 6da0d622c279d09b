"""The figures of a comparison, as far as its runs allow them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opd.record import dump
from tip.divergences import DIVERGENCES
from tip.results import figures
from tip.results.collect import curve
from tip.results.figures import Album, Bar, Curves, ShownToken, Whisker
from tip.results.runs import axis_of
from tip.results.token_map import dumped_updates
from tip.results.types import Results
from tip.tables import other_settings

MANY = 9  # lines in one plot
QUADRANTS = (1, 2, 3, 4)
MAIN = ("share_at_k", "mean_at_k", "greedy")  # what curves show: as the paper, the first that was measured
BARS = ("share_at_k", "share_best_at_2", "share_best_at_k")


def draw(results: Results, out: Path) -> dict[str, str]:
    """Figures in `out`; returns name -> caption. Quadrants and tokens are those of the arm that `results` is about."""
    album = Album(out)
    benchmarks = next(iter(results.arms.values())).last
    if not benchmarks:
        return album.captions
    metric = next(m for m in MAIN if all(m in e.accuracies for e in benchmarks.values()) or m == MAIN[-1])
    sampled = next(iter(benchmarks.values())).title(metric)
    _draw_differences(results, album)
    _draw_bars(results, list(benchmarks), album)
    text = f"Accuracy ({sampled}, %) at the evaluated updates; loss and divergence while training. Means over seeds."
    album.add(figures.lines(_training(results, list(benchmarks), metric), "update"), "training", text)
    _draw_tokens(results, album)
    retention = _against_retention(results, list(benchmarks), metric)
    if any(len(points) > 2 for curves in retention.values() for points in curves.values()):  # two are no curve
        marks = " The paper's values are lines of their own." if results.comparison.paper else ""
        text = f"Accuracy ({sampled}, %), covered divergence and cost against the share of tokens kept.{marks}"
        album.add(figures.lines(retention, "tokens kept, share"), "retention", text)
    return album.captions


def _draw_differences(results: Results, album: Album) -> None:
    """A figure for each benchmark, of the differences to the first baseline."""
    base = results.comparison.baselines[0]
    by_benchmark: dict[str, dict[str, list[Whisker]]] = {}
    for label, arm in results.arms.items():
        for name, evaluation in arm.last.items():
            series, in_paper = by_benchmark.setdefault(name, {}), results.comparison.paper.get(name, {})
            for metric, i in evaluation.differences.get(base, {}).items():
                series.setdefault(evaluation.title(metric), []).append((label, *i.points))
            if label != base and {label, base} <= in_paper.keys():
                gap = in_paper[label][0] - in_paper[base][0]
                series.setdefault("paper", []).append((label, gap, gap, gap))
    for name, series in by_benchmark.items():
        if series:
            text = f"How much better each arm is than {base} on {name} after the last update. Whiskers: 95 % intervals."
            drawn = figures.whiskers(series, f"accuracy on {name}, difference to {base}, points")
            album.add(drawn, "differences" if len(by_benchmark) == 1 else f"differences_{name}", text)


def _draw_bars(results: Results, benchmarks: Sequence[str], album: Album) -> None:
    """The paper's Figure 4, for each benchmark of conversations: the share of what was asked, and the best share."""
    in_paper, of = results.comparison.paper, results.comparison.paper_metric
    for name in benchmarks:
        models = {"step-0 student": results.step_0_student, "teacher": results.teacher}
        shown = models | {label: arm.last for label, arm in results.arms.items()}
        evaluations = {label: by_name[name] for label, by_name in shown.items() if name in by_name}
        panels: dict[str, list[Bar]] = {}
        for metric in BARS:
            for label, evaluation in evaluations.items():
                if (accuracy := evaluation.accuracies.get(metric)) is not None:
                    paper = in_paper.get(name, {}).get(label, [None])[0] if metric == of else None
                    bar = (label, 100 * accuracy.mean, 100 * (accuracy.se_seeds or accuracy.se_samples or 0.0), paper)
                    panels.setdefault(f"{evaluation.title(metric)}, {name}, %", []).append(bar)
        if panels:
            marks = " Crosses: the paper's values." if in_paper else ""
            text = (
                "The share of what was asked that conversations meet after the last update: the mean of a sample, and "
                f"the best of several. Lines: standard errors over seeds, or over problems with one seed.{marks}"
            )
            album.add(figures.bars(panels), "shares" if len(benchmarks) == 1 else f"shares_{name}", text)


def families(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Rule with its other settings -> labels of its arms by falling retention.

    A family starts from the arm of all tokens under the same loss, where there is one.
    """
    all_tokens = {_loss(chosen): [label] for label, chosen in settings.items() if chosen.get("tip.rule") == "all"}
    members: dict[str, list[str]] = {}
    for label, chosen in settings.items():
        if "tip.retention" in chosen and chosen["tip.rule"] != "all":
            rest = [f"{k}={v}" for k, v in other_settings(chosen).items()]
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
            reached = [(arm.retained, arm.last[name].accuracies.get(metric)) for arm in arms if name in arm.last]
            curves[family] = {retained: 100 * a.mean for retained, a in reached if a is not None}
            in_paper = {arm.retained: arm.paper[name][0] for arm in arms if name in arm.paper}
            if in_paper:
                curves[f"{family} (paper)"] = in_paper
    heights = {
        "divergence covered, share": lambda arm: 1.0 if arm.mass_covered is None else arm.mass_covered,
        "time of all updates, s": lambda arm: arm.seconds,
    }
    if not results.memory_note:
        heights["peak memory, GiB"] = lambda arm: arm.peak_memory_gb
    for title, height in heights.items():
        panels[title] = {f: {arm.retained: height(arm) for arm in arms} for f, arms in arms_of.items()}
    return panels


def _training(results: Results, benchmarks: Sequence[str], metric: str) -> dict[str, Curves]:
    """Of the arms of the first panel, then of the first of each other, as many as stay legible."""
    first, *others = ([a for a in panel.arms if a in results.arms] for panel in results.comparison.panels)
    shown = list(dict.fromkeys([*first, *(panel[0] for panel in others if panel)]))[:MANY]
    panels: dict[str, Curves] = {}
    for name in benchmarks:
        curves = panels[f"accuracy, {name}, %"] = {}
        for label in shown:
            by_step = {0: results.step_0_student} | results.arms[label].evaluations
            accuracies = [(step, e[name].accuracies.get(metric)) for step, e in by_step.items() if name in e]
            curves[label] = {step: 100 * a.mean for step, a in accuracies if a is not None}
    for title, key in (
        ("loss of the kept tokens, nats", "loss/divergence"),
        ("reverse KL of all tokens, nats", "divergence/reverse_kl"),
        ("drift of the selection from that of the frozen pair", "tip/drift"),
    ):
        curves = {label: curve(results.folders[label], key) for label in shown}
        panels |= {title: curves} if any(len(points) > 1 for points in curves.values()) else {}
    return panels


def _draw_tokens(results: Results, album: Album) -> None:
    runs, label = results.folders[results.subject], results.subject
    titles = {"share": "share of the tokens", "mass": "share of the divergence", "kept": "kept share of the quadrant"}
    panels = {t: {f"Q{q}": curve(runs, f"tip/{key}_q{q}") for q in QUADRANTS} for key, t in titles.items()}
    if all(len(points) > 1 for curves in panels.values() for points in curves.values()):
        text = f"The quadrants (explained below) while {label} trains, and what it keeps of each. Means over seeds."
        album.add(figures.lines(panels, "update"), "quadrants_while_training", text)
    first_run = next(iter(runs.values()))
    axis = axis_of(first_run)
    dumps = [row for path in dumped_updates(first_run)[:1] for row in dump.rows(path)]
    if not dumps or "quadrant" not in dumps[0]:
        return
    title = f"{label}, update {dumps[0]['step']}"
    about = f"{title}: {sum(len(rollout['token_ids']) for rollout in dumps)} tokens of {len(dumps)} rollouts."

    def column(name: str) -> np.ndarray:
        return np.array([number for rollout in dumps for number in rollout[name]])

    logged = (curve({0: first_run}, f"tip/threshold_{of}") for of in ("entropy", "divergence"))
    thresholds = [points.get(dumps[0]["step"]) for points in logged]
    if None not in thresholds:
        entropy = column("student_entropy") / math.log(dumps[0]["vocab_size"])
        drawn = figures.quadrant_map(entropy, column(axis), thresholds, title, DIVERGENCES[axis])
        album.add(drawn, "quadrants", f"Where the tokens lie. {about}")
    chosen = [_token_of(dumps, quadrant, axis) for quadrant in QUADRANTS]
    drawn = figures.qualitative([token for token in chosen if token is not None], title)
    album.add(drawn, "tokens", f"The token of highest divergence in each quadrant. {about}")
    keeps = {name[5:-4]: column(name).astype(bool) for name in dumps[0] if name.endswith("@0.2")}  # keep/<rule>@0.2
    if keeps:
        matrix = np.array([[(a & b).sum() / max((a | b).sum(), 1) for b in keeps.values()] for a in keeps.values()])
        text = "What two rules that keep 20 % share: the tokens that both keep, in % of those that either keeps."
        drawn = figures.heat_map(matrix, list(keeps), f"overlap of rules at 20 %\n{title}")
        album.add(drawn, "overlap", f"{text} {about}")


def _token_of(dumps: Sequence[dict[str, Any]], quadrant: int, axis: str) -> ShownToken | None:
    """The token of highest divergence, which is the column `axis`, in a quadrant; None where the quadrant is empty."""
    places = [(n, i) for n, rollout in enumerate(dumps) for i, at in enumerate(rollout["quadrant"]) if at == quadrant]
    if not places:
        return None
    n, i = max(places, key=lambda place: (dumps[place[0]][axis][place[1]], place))
    rollout = dumps[n]
    before = "".join(rollout["tokens"][max(0, i - 7) : i])[-40:]
    entropy, forward_kl, score = (rollout[name][i] for name in ("student_entropy", "forward_kl", "score"))
    about = (
        f"Q{quadrant}  ...{before} [{rollout['tokens'][i][:24]}]".replace("\n", "\\n")
        + f"\nentropy {entropy:.3f} nats, forward KL {forward_kl:.3f} nats, score {score:.3f}"
    )
    student, teacher = (
        [(repr(text)[1:-1], share) for text, share in rollout[f"{who}_top5"][i]] for who in ("student", "teacher")
    )
    return about, student, teacher
