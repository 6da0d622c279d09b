"""All rules compared on the same tokens, without training.

    python -m tip.analyze --config configs/tiny.json [--prompts 64] [--oracle-tokens N] [--out DIR]

The student answers prompts once, both models score the answers once, and every rule selects from these statistics:
which quadrants it takes, how much it shares with the other rules, and how much of the divergence and of the gradient
it covers at each retention. For a student small enough to take the gradient of single tokens, each rule is also held
against the oracle weight of a token, by brute force.
"""

import dataclasses
import json
import os
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from opd import distributed, models
from opd.batch import MicroBatch, make_micro_batches
from opd.benchmarks import check_context
from opd.cli import main, number_argument, parser, path_argument, say
from opd.config import Config, load_config
from opd.data import Prompt, prompts_of_step, read_training_prompts
from opd.errors import InputError
from opd.files import filled, lock, write_whole
from opd.hooks import TokenStats
from opd.launch import pick_device
from opd.progress import Progress
from opd.rollout import Decoding, Sampler
from opd.rollout.choose import fixed_sampler
from opd.seeds import generator
from opd.step import Pair, score_update
from opd.teacher.local import LocalTeacher, load_teacher
from tip import oracle, taxonomy
from tip.config import SECTIONS, TipConfig
from tip.diagnostics import correlation, jaccard, keep_by_every_rule, kept_by_decile, max_over_p99
from tip.oracle import DRAWS
from tip.results import figures
from tip.results.grid import grid
from tip.rules import BOTH_AXES, RULES
from tip.scores import Axes
from tip.weighter import TipWeighter

RETENTIONS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
SHOWN = (0.5, 0.2, 0.1)  # in the table and the overlap matrices: the paper's
COVERED = {  # TokenStats field -> what it is called
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "reverse_kl_energy": "gradient energy of reverse KL",
    "forward_kl_energy": "gradient energy of forward KL",
}
GRADIENTS = 2**30  # bytes of single-token gradients held at once
SMALL_STUDENT = 2_000_000  # parameters, up to which they are taken by default


def needs() -> frozenset[str]:
    """TokenStats fields of all rules, and those that are summed."""
    return BOTH_AXES.union(COVERED, *(rule.needs for rule in RULES.values()))


def analyse(stats: TokenStats, config: TipConfig, seed: int) -> dict[str, Any]:
    """Taxonomy, retained share, covered mass and energy, and overlap of every rule on these tokens.

    Args:
        stats: with the fields needs().
    """
    axes = Axes(stats, config)
    quadrants = taxonomy.of(axes)
    h, d = stats.student_entropy.double() / np.log(stats.vocab_size), stats.reverse_kl.double()
    everything = torch.ones(len(h), dtype=torch.bool)
    shares = taxonomy.describe(quadrants, stats.reverse_kl, everything)
    kept = keep_by_every_rule(stats, config, RETENTIONS, generator(seed, "analyze", 0))
    sampled = [name for name, rule in RULES.items() if rule.mechanic == "sample"]
    again = [
        keep_by_every_rule(stats, config, RETENTIONS, generator(seed, "analyze", i), sampled) for i in range(1, DRAWS)
    ]
    rules = {}
    for label, selected in kept.items():
        draws = [selected] + [other[label] for other in again if label in other]
        taken = [taxonomy.describe(quadrants, stats.reverse_kl, draw) for draw in draws]
        rules[label] = {
            "draws": len(draws),  # the figures are means over them
            "retained": fmean(draw.double().mean().item() for draw in draws),
            "covered": {name: fmean(_share(vars(stats)[name], draw) for draw in draws) for name in COVERED},
            "kept_in_quadrant": {f"q{q}": fmean(t[f"tip/kept_q{q}"] for t in taken) for q in (1, 2, 3, 4)},
            "kept_by_entropy_decile": [
                fmean(d) for d in zip(*(kept_by_decile(h, draw) for draw in draws), strict=True)
            ],
        }
    overlap = {}
    for retention in SHOWN:
        names = [label for label in kept if label.endswith(f"@{retention:g}") or "@" not in label]
        overlap[f"{retention:g}"] = {a: {b: jaccard(kept[a], kept[b]) for b in names} for a in names}
    return {
        "tokens": len(h),
        "rollouts": len(stats.sequence_id.unique()),
        "means": {
            name: vars(stats)[name].double().mean().item() for name in ("student_entropy", "teacher_entropy", *COVERED)
        },
        "quadrants": {
            "threshold_entropy": quadrants.threshold_entropy,
            "threshold_divergence": quadrants.threshold_divergence,
            **{f"{what}_q{q}": shares[f"tip/{what}_q{q}"] for what in ("share", "mass") for q in (1, 2, 3, 4)},
        },
        "corr_entropy_divergence": correlation(h, d),
        "divergence_max_over_p99": max_over_p99(d),
        "rules": rules,
        "overlap": overlap,
    }


def _share(values: Tensor, selected: Tensor) -> float:
    total = values.double().sum().item()
    return values[selected].double().sum().item() / total if total > 0 else 1.0


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    quadrants = result["quadrants"]
    shares = [
        (f"Q{q}", f"{100 * quadrants[f'share_q{q}']:.1f} %", f"{100 * quadrants[f'mass_q{q}']:.1f} %")
        for q in (1, 2, 3, 4)
    ]
    parts = [
        f"{result['tokens']} tokens of {result['rollouts']} rollouts; {result['command']}",
        f"quadrants (high: h above {quadrants['threshold_entropy']:.3f}, d above "
        f"{quadrants['threshold_divergence']:.3f} nats)"
        "\n\n" + grid(("", "tokens", "divergence"), shares),
        f"correlation of h and d {result['corr_entropy_divergence']:.3f}; largest d is "
        f"{result['divergence_max_over_p99']:.1f} times its 99th percentile",
    ]
    header = ("rule", "retained", *COVERED.values(), "Q1", "Q2", "Q3", "Q4")
    for retention in SHOWN:
        rows = []
        for label, found in result["rules"].items():
            name, _, at = label.partition("@")
            if at in ("", f"{retention:g}"):
                covered = [f"{100 * found['covered'][what]:.1f} %" for what in COVERED]
                inside = [f"{100 * found['kept_in_quadrant'][f'q{q}']:.0f} %" for q in (1, 2, 3, 4)]
                rows.append((name, f"{100 * found['retained']:.1f} %", *covered, *inside))
        parts.append(
            f"retention {retention:g}: covered share of each sum, and kept share of each "
            f"quadrant\n\n{grid(header, rows)}"
        )
    if result["oracle"]:
        rows = []
        for name, found in result["oracle"]["rules"].items():
            at = [f"{name}@{r:g}" if f"{name}@{r:g}" in found["cosine"] else name for r in SHOWN]
            correlations = ["-" if found[k] is None else f"{found[k]:.2f}" for k in ("score_weight", "score_gain")]
            rows.append((name, *correlations, *(f"{found['cosine'][label]:.3f}" for label in at)))
        header = ("rule", "score ~ oracle weight", "score ~ its gain", *(f"cosine at {r:g}" for r in SHOWN))
        parts.append(
            f"oracle by brute force on {result['oracle']['tokens']} tokens: Spearman correlation of the score with the "
            "oracle "
            "weight and with what it gains; cosine of the selection's gradient with that of a fresh batch, both "
            f"under {result['config']['loss']['divergence']}, whatever loss the rule takes itself (all tokens: "
            f"{result['oracle']['cosine_of_all']:.3f})\n\n{grid(header, rows)}"
        )
    return "\n\n".join(parts)


def plots(result: dict[str, Any], stats: TokenStats, out: Path) -> None:
    about = f"{result['tokens']} tokens of {result['rollouts']} rollouts. {result['command']}"
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for what, title in COVERED.items():
        panels[title] = {}
        for name, rule in RULES.items():
            if rule.mechanic != "weights":
                found = [result["rules"][f"{name}@{r:g}"] for r in RETENTIONS]
                panels[title][name] = [f["retained"] for f in found], [f["covered"][what] for f in found]
    figures.save(figures.lines(panels, "retained share of tokens", "covered share of the sum"), out, "coverage", about)
    for retention, matrix in result["overlap"].items():
        names = list(matrix)
        values = np.array([[matrix[a][b] for b in names] for a in names])
        drawn = figures.heat_map(
            values, [n.partition("@")[0] for n in names], f"Jaccard overlap at retention {retention}"
        )
        figures.save(drawn, out, f"overlap_{retention}", about)
    h = (stats.student_entropy.double() / np.log(stats.vocab_size)).numpy()
    thresholds = result["quadrants"]["threshold_entropy"], result["quadrants"]["threshold_divergence"]
    figures.save(figures.quadrant_map(h, stats.reverse_kl.double().numpy(), thresholds), out, "quadrants", about)


def _rollouts(config: Config, pair: Pair, sampler: Sampler, prompts: list[Prompt], part: str) -> list[MicroBatch]:
    decoding = Decoding(config.rollout.temperature, config.rollout.top_p, config.rollout.max_response_tokens)
    chosen = [prompt for prompt in prompts for _ in range(config.rollout.n)]
    seeds = [(config.seed, "analyze", part, i) for i in range(len(chosen))]
    with Progress(f"rollouts ({part})", len(chosen)) as progress:
        rollouts = sampler.sample(chosen, decoding, pair.vocab_size, seeds, progress.advance)
    return make_micro_batches(
        rollouts, config.optim.micro_batch_tokens, pair.student.eos_ids[0], config.rollout.truncated
    )


def run(config: Config, tip: TipConfig, prompts_wanted: int, oracle_tokens: int | None, out: Path, command: str) -> str:
    """Samples, scores, compares; writes analysis.json, table.md and the plots into `out`. Returns the table."""
    device = pick_device(config.engine)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("an analysis runs in one process, and WORLD_SIZE says there are more. Start it plainly.")
    if config.engine.kind == "deepspeed":
        distributed.start(device)  # for a teacher in host memory
    student, teacher = models.load(config.student, device, "student"), load_teacher(config, device)
    pair = Pair(student, LocalTeacher(teacher), models.shared_vocabulary(student, teacher), config.loss)
    prompts, _ = read_training_prompts(config.data, student.tokenizer, config.seed)
    for lm in (student, teacher):
        check_context(lm, "rollout.max_response_tokens", config.rollout.max_response_tokens, prompts)
    models.check_prompt_ids(prompts, teacher)
    TipWeighter(tip)  # refuses settings that do not go together
    if tip.scope != "update":
        raise InputError(f"tip.scope is {tip.scope!r}: an analysis has one batch and no past. Leave it at 'update'.")
    if 2 * prompts_wanted > len(prompts):
        raise InputError(
            f"--prompts is {prompts_wanted} and data.train has {len(prompts)} prompts: expected at most half."
        )
    parameters = sum(p.numel() for p in student.model.parameters())
    if oracle_tokens is None:
        oracle_tokens = 1024 if parameters <= SMALL_STUDENT else 0
    oracle_tokens = min(oracle_tokens, GRADIENTS // (4 * parameters))
    halves = [prompts_of_step(prompts, i, prompts_wanted, config.data.shuffle, config.seed) for i in (1, 2)]
    asked = [prompt for half in halves for prompt in half]
    with fixed_sampler(student, config.student, config, asked, config.rollout.max_response_tokens) as sampler:
        batches, fresh = (
            _rollouts(config, pair, sampler, half, part) for half, part in zip(halves, ("a", "b"), strict=True)
        )
    if not batches or not fresh:
        raise InputError(
            f"no response token counts with rollout.truncated = {config.rollout.truncated!r}. Set it to 'keep'."
        )
    with Progress("scoring", len(batches), "micro-batches") as progress:
        stats = score_update(pair, batches, needs(), 1, progress.advance)
    result = {"command": command, "config": dataclasses.asdict(config), "tip": dataclasses.asdict(tip)}
    result |= analyse(stats, tip, config.seed) | {"oracle": None}
    if oracle_tokens:
        names, gradients, target = oracle.token_gradients(pair, batches, fresh, oracle_tokens, config.seed)
        if len(names):
            result["oracle"] = oracle.against_oracle(stats, tip, config.seed, RETENTIONS, names, gradients, target)
    text = table(result)
    with filled(out, "--out") as new:
        write_whole(new / "analysis.json", json.dumps(result, indent=1) + "\n")
        write_whole(new / "table.md", text + "\n")
        plots(result, stats, new)
    say(f"{out}: analysis.json, table.md, coverage, overlap and quadrants (.png, .svg)")
    return text


def command(arguments: list[str]) -> None:
    transformers.logging.disable_progress_bar()
    cli = parser("python -m tip.analyze", "Compares all rules on the same tokens, without training.")
    cli.add_argument(
        "--prompts", type=number_argument(1), default=64, metavar="N", help="prompts answered and scored (64)"
    )
    cli.add_argument(
        "--oracle-tokens",
        type=number_argument(0),
        metavar="N",
        help=f"tokens whose own gradient is taken (1024 up to {SMALL_STUDENT:,} student parameters, else 0)",
    )
    cli.add_argument("--out", type=path_argument, metavar="DIR", help="default: output_dir/<run_name>-analysis")
    options = cli.parse_args(arguments)
    config, sections = load_config(options.config, options.overrides, SECTIONS)
    out = options.out or config.run_dir.with_name(f"{config.run_name}-analysis")
    from_user = " ".join(["python -m tip.analyze", *arguments])
    with lock(out, "--out"):
        print(run(config, sections["tip"], options.prompts, options.oracle_tokens, out, from_user))


if __name__ == "__main__":
    main(command)
