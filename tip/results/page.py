"""Figures of a table's runs, and report.html: one self-contained page with tables, figures, configuration and warnings.

Text that models or users wrote is escaped; there is no script in the page.
"""

import base64
import html
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from opd.files import step_number, write_whole
from opd.record import dump
from opd.record.metrics import read_metrics
from tip.results import collect as results
from tip.results import figures

MANY = 9  # lines in one plot
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 "
    "1em;color:#222}table{border-collapse:collapse;font-size:12px;display:block;overflow-x:auto}td,th{border:1px solid "
    "#ccc;padding:2px "
    "7px;white-space:nowrap;text-align:left}th{background:#f2f2f2}img{max-width:100%}pre{background:#f6f6f6;padding:1em;overflow-x:auto;font-size:12px}figcaption{font-size:12px;color:#555}"
)


def write(result: dict[str, Any], out: Path) -> None:
    """Draws what the runs allow, then report.html; each file whole or not at all."""
    drawn = draw(result, out)
    write_whole(out / "report.html", page(result, drawn, out))


def draw(result: dict[str, Any], out: Path) -> dict[str, str]:
    """Figures as PNG and SVG in `out`; returns name -> caption, in the order of the page."""
    seeds = result["seeds"]
    names = ", ".join(map(str, seeds))
    caption = (
        f"{result['title']}; pair {result['pair']}, n = {len(seeds)} seeds ({names}), commit {result['git_commit']}"
    )
    drawn: dict[str, str] = {}

    def save(figure: figures.Figure, name: str, text: str) -> None:
        drawn[name] = f"{text} {caption}."
        figures.save(figure, out, name, drawn[name])

    accuracy, metric = _last(result)
    if not accuracy:
        return drawn
    sampled = f"mean@{next(iter(accuracy.values()))['k']}" if metric == "mean_at_k" else "greedy"
    marks = " Diamonds: the paper's values." if result["paper_pair"] else ""
    memory = f" {results.CPU_MEMORY}" if result["machine"].endswith("no GPU") else ""
    save(
        figures.bars(_bars(result, accuracy, metric), f"accuracy ({sampled}), %", result["baselines"][0]),
        "accuracy",
        f"Accuracy after the last update; bars: standard error over seeds; dashed: {result['baselines'][0]}.{marks}",
    )
    if any(arm["retained"] < 1 for arm in result["arms"].values()):
        save(
            figures.lines(_against_retention(result, accuracy, metric), "tokens kept, share", ""),
            "retention",
            f"Retention against accuracy ({sampled}, %), covered divergence, peak memory, time.{memory}{marks}",
        )
    shown = _shown(result)
    save(
        figures.lines(_training(result, shown, accuracy, metric), "update", ""),
        "training",
        f"Accuracy ({sampled}, %) at the evaluated updates, loss and divergence while training; means over seeds.",
    )
    quadrants = {
        f"{what}: {label}": {f"Q{q}": results.curves(result["folders"][label], f"tip/{key}_q{q}") for q in (1, 2, 3, 4)}
        for label in shown[:2]
        for what, key in (("share of tokens", "share"), ("share of divergence", "mass"))
    }
    if all(x for panel in quadrants.values() for x, _ in panel.values()):
        save(figures.lines(quadrants, "update", "share"), "quadrants_while_training", "Quadrants while training.")
    dumps = _dumps(result, shown[0])
    if dumps and "quadrant" in dumps[0]:
        _from_dumps(dumps, _thresholds(result, shown[0], dumps[0]["step"]), save)
    return drawn


def _last(result: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Benchmarks of the first arm's last evaluation, and the metric to show: the paper's mean@k, else greedy."""
    evaluations = next(iter(result["arms"].values()))["evaluations"]
    if not evaluations:
        return {}, ""
    found = evaluations[list(evaluations)[-1]]
    return found, "mean_at_k" if all("mean_at_k" in block["metrics"] for block in found.values()) else "greedy"


def _final(arm: dict[str, Any], name: str, metric: str) -> dict[str, Any] | None:
    evaluations = arm["evaluations"]
    return evaluations[list(evaluations)[-1]].get(name, {"metrics": {}})["metrics"].get(metric) if evaluations else None


def _bars(
    result: dict[str, Any], benchmarks: dict[str, Any], metric: str
) -> dict[str, list[tuple[str, float, Any, Any]]]:
    panels: dict[str, list[tuple[str, float, Any, Any]]] = {}
    for name in benchmarks:
        rows = []
        for label, arm in result["arms"].items():
            found = _final(arm, name, metric)
            if found:
                error = None if found["se_seeds"] is None else 100 * found["se_seeds"]
                rows.append((label, 100 * found["mean"], error, arm["paper"].get(name, [None])[0]))
        panels[name] = rows
    return panels


def _families(result: dict[str, Any]) -> dict[str, list[str]]:
    """Rule with its other settings -> labels, by falling retention, from all tokens under the same loss where they
    are."""
    settings = {label: found for label, found in result["settings"].items() if label in result["arms"]}
    whole = {_loss(found): [label] for label, found in settings.items() if found.get("tip.rule") == "all"}
    families: dict[str, list[str]] = {}
    for label, found in settings.items():
        if "tip.retention" in found and found["tip.rule"] != "all":
            rest = [f"{k.rpartition('.')[2]}={v}" for k, v in found.items() if k not in ("tip.rule", "tip.retention")]
            families.setdefault(" ".join([found["tip.rule"], *rest]), []).append(label)
    return {
        family: whole.get(_loss(settings[labels[0]]), []) + sorted(labels, key=lambda a: -settings[a]["tip.retention"])
        for family, labels in families.items()
    }


def _loss(settings: dict[str, Any]) -> tuple[str | None, str]:
    """What decides an arm's loss: the divergence it sets, and its mixture (the rule's own where it sets none)."""
    own = "total_variation" if settings.get("tip.rule") == "total_variation" else "none"
    return settings.get("loss.divergence"), settings.get("tip.mixture") or own


def _against_retention(result: dict[str, Any], benchmarks: dict[str, Any], metric: str) -> dict[str, Any]:
    families, arms = _families(result), result["arms"]
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for name in benchmarks:
        panels[f"accuracy, {name}, %"] = {}
        for family, labels in families.items():
            points = [(arms[a]["retained"], _final(arms[a], name, metric)) for a in labels]
            points = [(x, 100 * y["mean"]) for x, y in points if y]
            panels[f"accuracy, {name}, %"][family] = [x for x, _ in points], [y for _, y in points]
            marks = [(arms[a]["retained"], arms[a]["paper"][name][0]) for a in labels if name in arms[a]["paper"]]
            if marks:
                panels[f"accuracy, {name}, %"][f"{family} (paper)"] = [x for x, _ in marks], [y for _, y in marks]
    for title, key in (
        ("divergence covered, share", "mass_covered"),
        ("peak memory, GiB", "peak_memory_gb"),
        ("time of all updates, s", "seconds"),
    ):
        panels[title] = {
            family: (
                [arms[a]["retained"] for a in labels],
                [arms[a][key] if arms[a][key] is not None else 1.0 for a in labels],
            )
            for family, labels in families.items()
        }
    return panels


def _shown(result: dict[str, Any]) -> list[str]:
    """Arms for plots over time: those of the first panel, then the first of each other, as many as stay legible."""
    panels = [[a for a in panel["arms"] if a in result["arms"]] for panel in result["panels"]]
    return (
        list(dict.fromkeys(panels[0] + [panel[0] for panel in panels[1:] if panel]))[:MANY]
        or list(result["arms"])[:MANY]
    )


def _training(result: dict[str, Any], shown: list[str], benchmarks: dict[str, Any], metric: str) -> dict[str, Any]:
    panels: dict[str, Any] = {}
    for name in benchmarks:
        start = result["start"]["step-0 student"].get(name, {"metrics": {}})["metrics"].get(metric)
        panels[f"accuracy, {name}, %"] = {}
        for label in shown:
            points = [(0, start)] if start else []
            points += [
                (int(s), e[name]["metrics"].get(metric))
                for s, e in result["arms"][label]["evaluations"].items()
                if name in e
            ]
            points = [(x, 100 * y["mean"]) for x, y in points if y]
            panels[f"accuracy, {name}, %"][label] = [x for x, _ in points], [y for _, y in points]
    for title, key in (
        ("loss of the kept tokens, nats", "loss/divergence"),
        ("reverse KL of all tokens, nats", "divergence/reverse_kl"),
    ):
        panels[title] = {label: results.curves(result["folders"][label], key) for label in shown}
    return panels


def _dumps(result: dict[str, Any], label: str) -> list[dict[str, Any]]:
    """Token dumps of an arm's first seed at its first dumped update."""
    folder = Path(next(iter(result["folders"][label].values())))
    path = next((p for p in sorted((folder / "tokens").glob("step_*.jsonl")) if step_number(p) is not None), None)
    return [] if path is None else dump.read(path)


def _thresholds(result: dict[str, Any], label: str, step: int) -> tuple[float, float] | None:
    """Of the quadrants at an update of an arm's first seed, if they were logged."""
    rows = read_metrics(Path(next(iter(result["folders"][label].values()))))
    row = next((r for r in rows if r["step"] == step), {})
    names = ("tip/threshold_entropy", "tip/threshold_divergence")
    return (row[names[0]], row[names[1]]) if set(names) <= set(row) else None


def _from_dumps(dumps: list[dict[str, Any]], thresholds: tuple[float, float] | None, save: Any) -> None:
    """The quadrant map, the overlap of rules and the qualitative panel."""
    log_v, step = math.log(dumps[0]["vocab_size"]), dumps[0]["step"]
    about = f"Update {step}, {len(dumps)} rollouts, {sum(len(row['token_ids']) for row in dumps)} tokens."

    def column(name: str) -> np.ndarray:
        return np.array([value for row in dumps for value in row[name]])

    h, d = column("student_entropy") / log_v, column("reverse_kl")
    if thresholds is not None:
        save(figures.quadrant_map(h, d, thresholds), "quadrants", f"Token density; dashed: the thresholds. {about}")
    keeps = {name.removeprefix("keep/"): column(name).astype(bool) for name in dumps[0] if name.endswith("@0.2")}
    if keeps:
        matrix = np.array([[(a & b).sum() / max((a | b).sum(), 1) for b in keeps.values()] for a in keeps.values()])
        labels = [name.partition("@")[0] for name in keeps]
        save(figures.heat_map(matrix, labels, "Jaccard overlap at retention 0.2"), "overlap", about)
    chosen = []
    for q in (1, 2, 3, 4):
        places = [
            (row["reverse_kl"][i], n, i)
            for n, row in enumerate(dumps)
            for i, at in enumerate(row["quadrant"])
            if at == q
        ]
        for _, n, i in sorted(places, reverse=True)[:1]:
            row = dumps[n]
            chosen.append(
                {
                    "quadrant": f"Q{q}",
                    "before": "".join(row["tokens"][max(0, i - 7) : i])[-40:].replace("\n", "\\n"),
                    "token": row["tokens"][i].replace("\n", "\\n"),
                    "entropy": row["student_entropy"][i],
                    "forward_kl": row["forward_kl"][i],
                    "score": row["score"][i],
                    **{who: [(repr(t)[1:-1], p) for t, p in row[f"{who}_top5"][i]] for who in ("student", "teacher")},
                }
            )
    save(figures.qualitative(chosen), "tokens", f"The token of highest divergence in each quadrant. {about}")


def page(result: dict[str, Any], drawn: dict[str, str], out: Path) -> str:
    """The HTML page."""
    body = [_html_of(results.markdown(result))]
    for name, text in drawn.items():
        data = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        body.append(
            f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(text)}</figcaption></figure>"
        )
    for title, value in (
        ("Arms", result["settings"]),
        ("Configuration of the first run", result["config"]),
        ("Versions", result["versions"]),
        ("Run folders", result["folders"]),
    ):
        text = html.escape(json.dumps(value, indent=1, ensure_ascii=False))
        body.append(f"<details><summary>{title}</summary><pre>{text}</pre></details>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(result["title"])}</title>'
        f"<style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def _html_of(markdown: str) -> str:
    """The little Markdown that tip.results writes: headings, tables, lists, paragraphs. Everything is escaped."""
    parts = []
    for block in markdown.strip().split("\n\n"):
        lines = [html.escape(line) for line in block.split("\n")]
        if block.startswith("#"):
            level = len(block) - len(block.lstrip("#"))
            parts.append(f"<h{level}>{lines[0].lstrip('# ')}</h{level}>")
        elif block.startswith("|"):
            cells = [
                [cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("|-")
            ]
            tags = ["th", *["td"] * (len(cells) - 1)]
            rows = [
                f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in row)}</tr>"
                for row, tag in zip(cells, tags, strict=True)
            ]
            parts.append(f"<table>{''.join(rows)}</table>")
        elif block.startswith("- "):
            parts.append(f"<ul>{''.join(f'<li>{line[2:]}</li>' for line in lines)}</ul>")
        else:
            parts.append(f"<p>{'<br>'.join(lines)}</p>")
    return "".join(parts)
