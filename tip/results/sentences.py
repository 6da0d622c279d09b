"""What was asked of a comparison and what came out, in sentences made from its intervals."""

from collections.abc import Mapping
from typing import Any

from opd.accuracy import Interval
from tip.results.markdown import what_is_covered
from tip.results.types import Results
from tip.tables import other_settings

NAMES = {
    "all": "all tokens",
    "random": "a random choice",
    "entropy_topk": "the top of entropy",
    "first_turns": "every turn but the last",
    "last_turn": "the last turn alone",
}
VERDICTS = ("better than", "worse than", "not distinguishable from")


def asked(results: Results) -> str:
    """The question, and on what it was tried."""
    base = _spoken(results.comparison.settings)[results.comparison.baselines[0]]
    sizes = {name: e.problems for arm in results.arms.values() for name, e in arm.last.items()}
    problems = " and ".join(f"{count} problems of {name}" for name, count in sizes.items()) or "no benchmark"
    return (
        "Which of its own tokens does a student have to learn from? For every seed the arms start from the same "
        f"student. After the last update each is measured on {problems} and compared with {base}."
    )


def came_out(results: Results) -> list[str]:
    """A sentence for each arm: how it stands to the first baseline after the last update."""
    base, names = results.comparison.baselines[0], _spoken(results.comparison.settings)
    sentences = []
    for label, arm in results.arms.items():
        by_verdict: dict[str, list[str]] = {}
        for name, evaluation in arm.last.items():
            for metric, interval in evaluation.differences.get(base, {}).items():
                mean, low, high = (f"{number:+.1f}" for number in interval.points)
                title = f"{name} {evaluation.title(metric)}" if len(arm.last) > 1 else evaluation.title(metric)
                figures = f"{mean} points {title}, 95 % interval {low} to {high}"
                by_verdict.setdefault(verdict(interval), []).append(figures)
        if by_verdict:
            parts = (f"{v} {names[base]}: {'; '.join(by_verdict[v])}" for v in VERDICTS if v in by_verdict)
            verb = "are" if names[label].startswith("all tokens") else "is"
            sentences.append(f"{names[label][0].upper()}{names[label][1:]} {verb} {', and '.join(parts)}.")
    return sentences


def verdict(interval: Interval) -> str:
    """What the interval of a difference says about an arm and its baseline, one of VERDICTS."""
    return VERDICTS[0 if interval.low > 0 else 1 if interval.high < 0 else 2]


def about_intervals(results: Results) -> str:
    """What the intervals of `came_out` cover, and what they do not say."""
    base = results.comparison.baselines[0]
    by_metric = [e.differences.get(base, {}) for arm in results.arms.values() for e in arm.last.values()]
    intervals = [interval for intervals in by_metric for interval in intervals.values()]
    text = "Not distinguishable means that the interval holds 0. It does not mean that the two are equal."
    return f"Each difference has {what_is_covered(intervals)}. {text}" if intervals else "No two arms were compared."


def _spoken(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Label of an arm -> what a sentence calls it: "Soft-OR at 50 %". Where two sound alike they keep their labels."""
    names = {}
    for label, chosen in settings.items():
        rule = chosen.get("tip.rule", "all")
        share = f" at {100 * chosen['tip.retention']:g} %" if "tip.retention" in chosen and rule != "all" else ""
        rest = [f"{k} = {v}" for k, v in other_settings(chosen).items()]
        name = NAMES.get(rule, rule.replace("soft_or", "Soft-OR").replace("_", " "))
        names[label] = f"{name}{share}{' with ' if rest else ''}{', '.join(rest)}"
    heard = list(names.values())
    return {label: name if heard.count(name) == 1 else label for label, name in names.items()}
