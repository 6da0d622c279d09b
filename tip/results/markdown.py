"""The tables of a comparison, and what is written below them: on the console, in table.md and in report.html."""

from collections.abc import Iterable, Iterator, Mapping

from opd.accuracy import PROBLEMS_ONLY, SEEDS_AND_PROBLEMS, Interval
from tip.results import drafting, turns
from tip.results.grid import difference_cell, grid
from tip.results.types import PHASES, Accuracy, ArmResult, Evaluation, Results, measured

Table = tuple[tuple[str, ...], dict[str, list[tuple[str, ...]]]]  # header, and title of a group -> its rows
TOGETHER = 3  # measures whose accuracies and differences stand in one table
CONVERSATIONS = (
    " Of conversations, greedy and mean@k are the share in which everything holds that was asked. share@k, the paper's "
    "Avg@k, is the mean share of what was asked. best@2 is the best share of two samples, as a mean over all pairs of "
    "them, and best@k that of all samples. delivered is the share that ends in an answer."
)


def markdown(results: Results) -> str:
    """The tables, panel by panel; then what the runs cost, and how to read it."""
    comparison = results.comparison
    about = f"pair {comparison.pair}, seeds {', '.join(map(str, comparison.seeds))}, commit {results.commit}"
    parts = [f"# {comparison.title}", comparison.command, f"{about}, {results.machine}", comparison.note]
    if not results.arms:
        return "\n\n".join(filter(None, [*parts, "No run has finished.", missing(results)])) + "\n"
    for heading, (header, groups) in blocks(results):
        parts.append(f"## {heading}")
        models = groups.pop("", [])  # they stand in the first panel alone
        for title, rows in groups.items():
            parts += [title, grid(header, [*models, *rows])]
            models = []
    parts += [legend(results), drafting.markdown(results), turns.text(results.turns)]
    parts += [cost(results), missing(results), warnings(results)]
    return "\n\n".join(filter(None, parts)) + "\n"


def blocks(results: Results) -> Iterator[tuple[str, Table]]:
    """A table per evaluated update (or the last) and benchmark, with its heading."""
    arms = results.arms
    if results.comparison.every_evaluation:
        steps = sorted({step for arm in arms.values() for step in arm.evaluations})
        moments = [(f"update {s}", {label: arm.evaluations.get(s, {}) for label, arm in arms.items()}) for s in steps]
    else:
        steps = sorted({max(arm.evaluations) for arm in arms.values() if arm.evaluations})
        when = (
            f"update {steps[0]}" if len(steps) == 1 else f"the last update of each run ({', '.join(map(str, steps))})"
        )
        moments = [(when, {label: arm.last for label, arm in arms.items()})]
    for when, by_arm in moments:
        for name in dict.fromkeys(name for evaluations in by_arm.values() for name in evaluations):
            evaluated = {label: evaluations[name] for label, evaluations in by_arm.items() if name in evaluations}
            yield f"{name} after {when}", _table(results, name, evaluated)
            if are_apart(results) and len(evaluated) > 1:
                yield f"{name} after {when}, differences", _differences(results, evaluated)


def are_apart(results: Results) -> bool:
    """Whether differences have a table of their own, because there are too many measures for one table."""
    return len(_metrics(results)) > TOGETHER


def _metrics(results: Results) -> list[str]:
    """The measures that some evaluation took."""
    by_name = [results.step_0_student, results.teacher, *(arm.last for arm in results.arms.values())]
    return measured([evaluation for evaluations in by_name for evaluation in evaluations.values()])


def _table(results: Results, name: str, evaluated: Mapping[str, Evaluation]) -> Table:
    """Its groups are step-0 student and teacher, without a title, and the panels."""
    comparison, models = results.comparison, {"step-0 student": results.step_0_student, "teacher": results.teacher}
    shown = {who: evaluations[name] for who, evaluations in models.items() if name in evaluations}
    everything = [*shown.values(), *evaluated.values()]
    metrics, with_kl = measured(everything), any(evaluation.reverse_kl is not None for evaluation in everything)
    titles = [everything[-1].title(metric) for metric in metrics]
    header = ["arm", *titles, *(["reverse KL"] if with_kl else []), *(["paper"] if comparison.paper else [])]
    compared = () if are_apart(results) else comparison.baselines
    header += [f"{title} - {base}" for base in compared for title in titles]
    header += ["tokens kept", "divergence covered", "peak GiB", "s"]

    def row(label: str, evaluation: Evaluation | None, arm: ArmResult | None) -> tuple[str, ...]:
        if evaluation is None:
            cells = [label, "no run finished" if arm is None else "not evaluated"]
        else:
            cells = [label, *_accuracy_cells(evaluation, metrics, with_kl)]
        if evaluation is not None and arm is not None:
            if comparison.paper:
                cells.append("{:.1f} +- {:.1f}".format(*arm.paper[name]) if name in arm.paper else "-")
            for base in compared:
                cells += _difference_cells(evaluation, base, metrics)
            cells += [*_kept_cells(arm), f"{arm.peak_memory_gb:.2f}", f"{arm.seconds:.1f}"]
        return (*cells, *[""] * (len(header) - len(cells)))

    groups = {"": [row(who, evaluation, None) for who, evaluation in shown.items()]}
    for panel in comparison.panels:
        groups[panel.title] = [row(label, evaluated.get(label), results.arms.get(label)) for label in panel.arms]
    return tuple(header), groups


def _differences(results: Results, evaluated: Mapping[str, Evaluation]) -> Table:
    """Its groups are the panels, without the baselines' own rows."""
    comparison, metrics = results.comparison, measured(list(evaluated.values()))
    titles = [next(iter(evaluated.values())).title(metric) for metric in metrics]
    groups = {
        f"{panel.title}, minus {base}": [
            (label, *_difference_cells(evaluated[label], base, metrics))
            for label in panel.arms
            if label in evaluated and label != base
        ]
        for panel in comparison.panels
        for base in comparison.baselines
    }
    groups = {title: rows for title, rows in groups.items() if rows}
    return ("arm", *titles), groups


def _difference_cells(evaluation: Evaluation, base: str, metrics: Iterable[str]) -> list[str]:
    return [difference_cell(evaluation.differences.get(base, {}).get(metric)) for metric in metrics]


def _accuracy_cells(evaluation: Evaluation, metrics: Iterable[str], with_kl: bool) -> list[str]:
    cells = [_accuracy_cell(evaluation.accuracies.get(metric)) for metric in metrics]
    if with_kl:
        cells.append("-" if evaluation.reverse_kl is None else f"{evaluation.reverse_kl:.3f}")
    return cells


def _accuracy_cell(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "-"
    seeds = "" if accuracy.se_seeds is None else f" +- {100 * accuracy.se_seeds:.1f}"
    samples = "" if accuracy.se_samples is None else f" ({100 * accuracy.se_samples:.1f})"
    return f"{100 * accuracy.mean:.1f}{seeds}{samples}"


def _kept_cells(arm: ArmResult) -> tuple[str, str]:
    if arm.retained == 1:
        return "100.0 %", "100.0 %"
    covered = "-" if arm.mass_covered is None else f"{100 * arm.mass_covered:.1f} %"
    return f"{100 * arm.retained:.1f} %", covered


def legend(results: Results) -> str:
    evaluations = [arm.last for arm in results.arms.values()]
    sizes = {name: evaluation.problems for by_name in evaluations for name, evaluation in by_name.items()}
    if not sizes:
        return ""
    text = (
        f"Accuracy in % over {', '.join(f'{count} problems of {name}' for name, count in sizes.items())}: mean over "
        'seeds +- standard error over seeds (standard error over samples). "-": not measured.'
    )
    everything = [evaluation for by_name in evaluations for evaluation in by_name.values()]
    if any("share_at_k" in evaluation.accuracies for evaluation in everything):
        text += CONVERSATIONS
    if any(evaluation.reverse_kl is not None for evaluation in everything):
        text += " Reverse KL to the teacher in nats per token of the sampled responses."
    intervals = list(results.differences)
    if intervals:
        text += (
            f" Differences in points, paired by seed and problem, with {what_is_covered(intervals)}, and the number of "
            f"seeds on which the arm is better. The runs give {len(intervals)} such differences"
        )
        chance = len(intervals) // 20
        text += f"; if nothing differed, some {chance} of their intervals would miss 0 all the same." if chance else "."
    return text + results.memory_note


def what_is_covered(intervals: Iterable[Interval]) -> str:
    """What 95 % intervals hold for; in a stopped table some can be of one seed, others of more."""
    kinds = {interval.covers for interval in intervals}
    of_one_seed = "over problems only (it says nothing about another training)"
    if SEEDS_AND_PROBLEMS not in kinds:
        return f"a 95 % interval {of_one_seed}"
    rest = f"; where one seed is compared (0/1 or 1/1), {of_one_seed}" if PROBLEMS_ONLY in kinds else ""
    return f"a 95 % interval that covers {SEEDS_AND_PROBLEMS}{rest}"


def cost(results: Results) -> str:
    header = ("arm", *PHASES, "whole updates", "evaluations", "peak GiB", "run folder")
    rows = []
    for label, arm in results.arms.items():
        seconds = (*(arm.seconds_by_phase[phase] for phase in PHASES), arm.seconds, arm.seconds_evaluating)
        folder, *others = results.folders[label].values()
        where = f"{folder} and {len(others)} more" if others else str(folder)
        rows.append((label, *(f"{spent:.1f}" for spent in seconds), f"{arm.peak_memory_gb:.2f}", where))
    about = "cost: seconds per phase, sum over all updates, mean over seeds; and peak memory of the process"
    return f"{about}\n\n{grid(header, rows)}"


def missing(results: Results) -> str:
    lines = [f"- {label}, seed {s}: {why}" for label, runs in results.missing.items() for s, why in runs.items()]
    return "Not in the table:\n\n" + "\n".join(lines) if lines else ""


def warnings(results: Results) -> str:
    lines = [
        f"- {label}: {warned.times} x {kind}, first {warned.first}"
        for label, arm in results.arms.items()
        for kind, warned in arm.warnings.items()
    ]
    return "Warnings of the runs:\n\n" + "\n".join(lines) if lines else ""
