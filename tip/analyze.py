"""All rules compared on the same tokens, without training.

    python -m tip.analyze --config configs/tiny.json [--prompts 64] [--oracle-tokens N] [--teacher-topk 8,32]

The student answers prompts once, both models score the answers once, and every rule selects from these statistics. The
table says which quadrants a rule takes, what it shares with the other rules, and how much of the divergence and of the
gradient it covers at each retention. For a small student every rule is also compared with the oracle weight of a token,
which takes the gradient of every single token (tip.oracle). With --teacher-topk it also says what would be left of
scores and selections if the teacher showed its likeliest ids alone (tip.partial).

Shapes: N scored tokens.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from opd import distributed, models, speculative
from opd.batch import MicroBatch, make_micro_batches
from opd.benchmarks import check_context
from opd.cli import main, say
from opd.config import Config, load_config
from opd.data import Prompt, prompts_of_step, read_training_prompts
from opd.device import pick_device
from opd.errors import InputError
from opd.files import filled, lock, write_whole
from opd.hooks import TokenStats
from opd.privileged import for_training
from opd.progress import Progress
from opd.rollout import Decoding, Sampler
from opd.rollout.choose import fixed_sampler
from opd.rollout.turns import converse, open_dialogue
from opd.seeds import generator
from opd.step import Pair, score_update
from opd.teacher.choose import open_teacher, scoring_teacher
from tip import oracle, partial, taxonomy
from tip.commands import COMMANDS, SMALL_STUDENT
from tip.config import SECTIONS, TipConfig
from tip.diagnostics import (
    correlation,
    jaccard,
    keep_by_every_rule,
    kept_by_decile,
    max_over_p99,
    needs_of_every_rule,
    normalised_entropy,
)
from tip.divergences import DIVERGENCES, divergence_of
from tip.oracle import DRAWS
from tip.results import figures, frame
from tip.results.grid import grid
from tip.rules import RULES
from tip.scores import Axes
from tip.weighter import TipWeighter

RETENTIONS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
SHOWN = (0.5, 0.2, 0.1)  # in the table and the overlap matrices, as in the paper
QUADRANTS = (1, 2, 3, 4)
COVERED = {  # TokenStats field -> what it is called
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "reverse_kl_energy": "gradient energy of reverse KL",
    "forward_kl_energy": "gradient energy of forward KL",
}
BLOCKS = (2, 4, 8)  # tokens that speculative decoding drafts at once
GRADIENTS = 2**30  # bytes of single-token gradients held at once


def analyse(stats: TokenStats, config: TipConfig, seed: int) -> dict[str, Any]:
    """Quadrants, retained share, covered divergence and energy, and overlap of every rule on these tokens.

    `stats` holds the fields of all rules and those of `sums_of`.
    """
    quadrants, h_N = taxonomy.of(Axes(stats, config)), normalised_entropy(stats)
    d_N, sums = divergence_of(stats, config.axis), sums_of(config.axis)
    shares = taxonomy.describe(quadrants, d_N, torch.ones(len(h_N), dtype=torch.bool))
    sampled = [name for name, rule in RULES.items() if rule.mechanic == "sample"]
    draws = [
        keep_by_every_rule(stats, config, RETENTIONS, generator(seed, "analyze", i), sampled if i else RULES)
        for i in range(DRAWS)
    ]
    columns, rules = {name: vars(stats)[name].double() for name in sums}, {}
    for label in draws[0]:
        kept = [draw[label] for draw in draws if label in draw]
        described = [taxonomy.describe(quadrants, d_N, kept_N) for kept_N in kept]
        deciles = zip(*(kept_by_decile(h_N, kept_N) for kept_N in kept), strict=True)
        rules[label] = {
            "draws": len(kept),  # the figures are means over them
            "retained": fmean(kept_N.double().mean().item() for kept_N in kept),
            "covered": {
                name: fmean(taxonomy.covered(column_N, kept_N) for kept_N in kept) for name, column_N in columns.items()
            },
            "kept_in_quadrant": {f"q{q}": fmean(metrics[f"tip/kept_q{q}"] for metrics in described) for q in QUADRANTS},
            "kept_by_entropy_decile": [fmean(decile) for decile in deciles],
        }
    overlap = {}
    for retention in SHOWN:
        kept = {label: kept_N for label, kept_N in draws[0].items() if _is_at(label, retention)}
        overlap[f"{retention:g}"] = {a: {b: jaccard(kept[a], kept[b]) for b in kept} for a in kept}
    return {
        "tokens": len(h_N),
        "rollouts": len(stats.sequence_id.unique()),
        "means": {
            name: vars(stats)[name].double().mean().item() for name in ("student_entropy", "teacher_entropy", *sums)
        },
        "quadrants": {
            "threshold_entropy": quadrants.threshold_entropy,
            "threshold_divergence": quadrants.threshold_divergence,
            **{f"{what}_q{q}": shares[f"tip/{what}_q{q}"] for what in ("share", "mass") for q in QUADRANTS},
        },
        "corr_entropy_divergence": correlation(h_N, d_N),
        "divergence_max_over_p99": max_over_p99(d_N),
        "speculative": {
            "acceptance": speculative.acceptance(stats),
            "accepted_length": {gamma: speculative.accepted_length(stats, gamma) for gamma in BLOCKS},
        },
        "rules": rules,
        "overlap": overlap,
    }


def sums_of(axis: str) -> dict[str, str]:
    """The fields of TokenStats whose covered share is told, with their names: COVERED and the divergence that is d."""
    return COVERED | {axis: DIVERGENCES[axis].title}


def _is_at(label: str, retention: float) -> bool:
    """Whether `<rule>@<retention>` is at this retention; a label without one is at every retention."""
    return label.partition("@")[2] in ("", f"{retention:g}")


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    quadrants, axis = result["quadrants"], DIVERGENCES[result["tip"]["axis"]]
    shares = [(f"Q{q}", *(f"{100 * quadrants[f'{what}_q{q}']:.1f} %" for what in ("share", "mass"))) for q in QUADRANTS]
    parts = [
        f"{result['tokens']} tokens of {result['rollouts']} rollouts; {result['command']}",
        f"quadrants (high: h above {quadrants['threshold_entropy']:.3f}, d, which is the {axis.title}, above "
        f"{axis.shown(quadrants['threshold_divergence'])})\n\n" + grid(("", "tokens", "divergence"), shares),
        f"correlation of h and d {result['corr_entropy_divergence']:.3f}; largest d is "
        f"{result['divergence_max_over_p99']:.1f} times its 99th percentile",
        f"as a drafter: {100 * result['speculative']['acceptance']:.1f} % of the drafted tokens are accepted, and of a "
        + ", of ".join(f"block of {gamma} {n:.2f}" for gamma, n in result["speculative"]["accepted_length"].items()),
    ]
    header = ("rule", "retained", *sums_of(result["tip"]["axis"]).values(), *(f"Q{q}" for q in QUADRANTS))
    for retention in SHOWN:
        rows = []
        for label, rule in result["rules"].items():
            if _is_at(label, retention):
                sums = (f"{100 * share:.1f} %" for share in (rule["retained"], *rule["covered"].values()))
                inside = (f"{100 * share:.0f} %" for share in rule["kept_in_quadrant"].values())
                rows.append((label.partition("@")[0], *sums, *inside))
        title = f"retention {retention:g}: covered share of each sum, and kept share of each quadrant"
        parts.append(f"{title}\n\n{grid(header, rows)}")
    if result["oracle"]:
        parts.append(_oracle_table(result))
    if result["partial_teacher"]:
        parts.append(partial.table(result["partial_teacher"], result["tip"]["axis"]))
    return "\n\n".join(parts)


def _oracle_table(result: dict[str, Any]) -> str:
    rows = []
    for name, rule in result["oracle"]["rules"].items():
        correlations = ("-" if rule[key] is None else f"{rule[key]:.2f}" for key in ("score_weight", "score_gain"))
        cosines = (rule["cosine"].get(f"{name}@{retention:g}", rule["cosine"].get(name)) for retention in SHOWN)
        rows.append((name, *correlations, *(f"{cosine:.3f}" for cosine in cosines)))
    header = ("rule", "score ~ oracle weight", "score ~ its gain", *(f"cosine at {r:g}" for r in SHOWN))
    return (
        f"oracle by brute force on {result['oracle']['tokens']} tokens: Spearman correlation of the score with the "
        "oracle weight and with what it gains; cosine of the selection's gradient with that of a fresh batch, both "
        f"under {result['config']['loss']['divergence']}, whatever loss the rule takes itself (all tokens: "
        f"{result['oracle']['cosine_of_all']:.3f})\n\n{grid(header, rows)}"
    )


def plots(result: dict[str, Any], stats: TokenStats, out: Path) -> dict[str, str]:
    """Draws coverage, overlap and quadrants into the folder `out`; returns name -> caption."""
    album = figures.Album(out)
    axis = result["tip"]["axis"]
    panels: dict[str, figures.Curves] = {title: {} for title in sums_of(axis).values()}
    for name in (name for name, rule in RULES.items() if rule.mechanic != "weights"):
        rules = [result["rules"][f"{name}@{retention:g}"] for retention in RETENTIONS]
        for field, title in sums_of(axis).items():
            panels[title][name] = {rule["retained"]: rule["covered"][field] for rule in rules}
    text = "What share of each sum a rule's tokens hold, against the share of tokens that it keeps."
    album.add(figures.lines(panels, "retained share of tokens"), "coverage", text)
    for retention, overlap in result["overlap"].items():
        matrix = np.array([list(row.values()) for row in overlap.values()])
        names = [label.partition("@")[0] for label in overlap]
        drawn = figures.heat_map(matrix, names, f"overlap of rules at retention {retention}")
        text = f"What two rules share at retention {retention}: tokens that both keep, in % of those that either keeps."
        album.add(drawn, f"overlap_{retention}", text)
    thresholds = result["quadrants"]["threshold_entropy"], result["quadrants"]["threshold_divergence"]
    h, d = normalised_entropy(stats).numpy(), divergence_of(stats, axis).double().numpy()
    drawn = figures.quadrant_map(h, d, thresholds, "step-0 student", DIVERGENCES[axis])
    album.add(drawn, "quadrants", "Where the tokens lie.")
    return album.captions


def page(result: dict[str, Any], text: str, captions: dict[str, str], out: Path) -> str:
    """The HTML page of the table `text` and the figures that lie in `out`."""
    asked = (
        "Which tokens does each rule keep, and how much of the signal do they hold? The step-0 student answered its "
        f"prompts once: {result['tokens']} tokens of {result['rollouts']} rollouts. Nothing was trained."
    )
    quadrants = {"quadrants": captions.pop("quadrants")}
    settings = (("Configuration", result["config"]), ("Section tip", result["tip"]))
    sections = {
        "What was asked": f"<p>{asked}</p>",
        "What came out": frame.html_of(_what_came_out(result)),
        "Table": frame.html_of(text),
        "The four quadrants": frame.figures_of(quadrants, out, frame.quadrants_in_words()),
        "Coverage and overlap": frame.figures_of(captions, out),
        "Details": "".join(frame.fold(title, frame.as_json(content)) for title, content in settings),
    }
    return frame.frame("All rules on the same tokens", result["command"], sections)


def _what_came_out(result: dict[str, Any]) -> str:
    """A sentence per retention, as a Markdown list."""
    sentences = []
    for retention in SHOWN:
        held = {
            name: 100 * result["rules"][f"{name}@{retention:g}"]["covered"][result["tip"]["axis"]]
            for name in ("soft_or", "entropy_topk", "random")
        }
        sentences.append(
            f"- With {100 * retention:g} % of the tokens Soft-OR holds {held['soft_or']:.1f} % of the divergence, the "
            f"highest entropy {held['entropy_topk']:.1f} %, and a random choice {held['random']:.1f} %."
        )
    return "\n".join(sentences)


def _rollouts(config: Config, pair: Pair, sampler: Sampler, prompts: list[Prompt], part: str) -> list[MicroBatch]:
    dialogue = open_dialogue(config.data.environment, pair.student, config.data)
    decoding = Decoding(config.rollout.temperature, config.rollout.top_p, config.rollout.max_response_tokens)
    chosen = [prompt for prompt in prompts for _ in range(config.rollout.n)]
    seeds = [(config.seed, "analyze", part, i) for i in range(len(chosen))]
    with Progress(f"rollouts ({part})", len(chosen)) as progress:
        rollouts = converse(sampler, dialogue, chosen, decoding, pair.vocab_size, seeds, progress.advance)
    return make_micro_batches(
        rollouts,
        config.optim.micro_batch_tokens,
        pair.student.eos_ids[0],
        config.rollout.truncated,
        pair.packed_row,
    )


def _load(config: Config) -> tuple[Pair, list[Prompt]]:
    """Both models, and the prompts of training checked against them. Raises InputError for what cannot be used."""
    device = pick_device(config.engine)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("an analysis runs in one process, and WORLD_SIZE says there are more. Start it plainly.")
    if config.engine.kind == "deepspeed":
        distributed.start(device)  # for a teacher in host memory
    student = models.load(config.student, device, "student")
    teacher = open_teacher(config, student, device)
    vocab_size = models.shared_vocabulary(student, teacher)
    pair = Pair(student, scoring_teacher(config, teacher, device), vocab_size, config.loss)
    dialogue = open_dialogue(config.data.environment, student, config.data)
    data = dialogue.data if dialogue else config.data
    prompts, _ = read_training_prompts(data, student.tokenizer, config.seed)
    prompts = for_training(prompts, config, data, student, teacher)
    for lm in (student, teacher):
        check_context(lm, "rollout.max_response_tokens", config.rollout.max_response_tokens, prompts)
    models.check_prompt_ids(prompts, teacher)
    return pair, prompts


def run(
    config: Config,
    tip: TipConfig,
    prompts_wanted: int,
    oracle_tokens: int | None,
    topk: Sequence[int],
    out: Path,
    command: str,
) -> str:
    """Samples, scores and compares, and writes the page, analysis.json, table.md and the plots into `out`.

    The oracle takes the gradients of `oracle_tokens` tokens; None means 1,024 for a small student, else none. `topk`
    holds how many ids a partial teacher shows; empty: nothing is asked of one. Returns the table.
    """
    pair, prompts = _load(config)
    TipWeighter(tip)  # refuses settings that do not go together
    if tip.scope != "update":
        raise InputError(f"tip.scope is {tip.scope!r}: an analysis has one batch and no past. Leave it at 'update'.")
    if 2 * prompts_wanted > len(prompts):
        raise InputError(
            f"--prompts is {prompts_wanted} and data.train has {len(prompts)} prompts: expected at most half."
        )
    parameters = sum(p.numel() for p in pair.student.model.parameters())
    if oracle_tokens is None:
        oracle_tokens = 1024 if parameters <= SMALL_STUDENT else 0
    oracle_tokens = min(oracle_tokens, GRADIENTS // (4 * parameters))
    scored, fresh = (prompts_of_step(prompts, i, prompts_wanted, config.data.shuffle, config.seed) for i in (1, 2))
    longest = config.rollout.max_response_tokens
    with fixed_sampler(pair.student, config.student, config, scored + fresh, longest) as sampler:
        batches = _rollouts(config, pair, sampler, scored, "a")
        fresh_batches = _rollouts(config, pair, sampler, fresh, "b")
    if not batches or not fresh_batches:
        raise InputError(
            f"no response token counts with rollout.truncated = {config.rollout.truncated!r}. Set it to 'keep'."
        )
    needs = needs_of_every_rule(tip.axis) | DIVERGENCES.keys() | sums_of(tip.axis).keys() | speculative.NEEDS
    with Progress("scoring", len(batches), "micro-batches") as progress:
        stats = score_update(pair, batches, needs, 1, progress.advance)
    result = {"command": command, "config": dataclasses.asdict(config), "tip": dataclasses.asdict(tip)}
    result |= analyse(stats, tip, config.seed) | {"oracle": None, "partial_teacher": None}
    if topk:
        views = partial.topk_views(pair, batches, stats, topk)
        views[partial.SAMPLED] = partial.sampled_view(stats, config.loss.jsd_beta)
        result["partial_teacher"] = partial.survival(stats, views, tip, config.seed, SHOWN)
    if oracle_tokens:
        measured = oracle.token_gradients(pair, batches, fresh_batches, oracle_tokens, config.seed)
        if len(measured[0]):
            result["oracle"] = oracle.against_oracle(stats, tip, config.seed, RETENTIONS, *measured)
    text = table(result)
    with filled(out, "--out") as folder:
        write_whole(folder / "analysis.json", json.dumps(result, indent=1) + "\n")
        write_whole(folder / "table.md", text + "\n")
        captions = plots(result, stats, folder)
        write_whole(folder / "analysis.html", page(result, text, captions, folder))
    say(f"{out}: analysis.html, analysis.json, table.md, coverage, overlap and quadrants (.png, .svg)")
    return text


def command(arguments: list[str]) -> None:
    options = COMMANDS["analyze"].parser().parse_args(arguments)
    config, sections = load_config(options.config, options.overrides, SECTIONS)
    out = options.out or config.run_dir.with_name(f"{config.run_name}-analysis")
    from_user = " ".join(["python -m tip.analyze", *arguments])
    with lock(out, "--out"), Progress("analysis"):
        tip, topk = sections["tip"], options.teacher_topk
        text = run(config, tip, options.prompts, options.oracle_tokens, topk, out, from_user)
    print(text)


if __name__ == "__main__":
    main(command)
