"""A whole update against TRL's: rollouts, teacher, scoring and update on the same pair, prompts and optimizer.

    PYTHONPATH=. python tests/benchmarks/bench_step.py [--peer PYTHON] [--repeats N] [--quick] [--out FOLDER]

Sides:
  plain     this trainer, all tokens
  soft_or   this trainer, the half of the tokens that Soft-OR chooses, scoring pass included
  trl       trl 1.16, DistillationTrainer, in an environment of its own

Each side runs in a process of its own with one thread, one after another, and then all again. The first update of a
process warms up. A figure is the median of its other updates, then the median over repeats, and a ratio is the median
of the ratios of a repeat. Responses are either all as long as the limit, or of natural lengths (random_models.Ends),
which are the same on every side. A micro-batch has as many padded tokens at most on every side.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from resident import high_water, resident

SIDES = ("plain", "soft_or", "trl")
PHASES = ("rollout", "teacher", "score", "update")
EMBEDDED = {"pair": "embedded", "rollouts": 32, "rows": 32, "prompt_tokens": 24, "longest": 40, "lr": 3e-4}
MIDDLE = {"pair": "middle", "rollouts": 32, "rows": 4, "prompt_tokens": 32, "lr": 1e-5, "updates": 1}
TOY = {"pair": "toy", "rollouts": 8, "rows": 4, "prompt_tokens": 4, "lr": 1e-5, "updates": 1}
SETTINGS = {
    "embedded pair, equal lengths": {**EMBEDDED, "lengths": "equal", "updates": 5},
    "embedded pair, its own lengths": {**EMBEDDED, "lengths": "natural", "updates": 5},
    "42 M and 108 M, equal lengths": {**MIDDLE, "lengths": "equal", "mean": 40, "longest": 40},
    "42 M and 108 M, natural lengths": {**MIDDLE, "lengths": "natural", "mean": 40, "longest": 320},
}
QUICK = {
    "toy pair, natural lengths": {**TOY, "lengths": "natural", "mean": 4, "longest": 32},
}


# --- one side ---------------------------------------------------------------------------------------------------------
def own_updates(setting: dict[str, Any], side: str) -> dict[str, Any]:
    """What trl_update.py does, by this trainer: the measured updates of a setting, and the memory of this process."""
    import torch
    from random_models import lognormal_lengths, material
    from updates import Updates, as_a_run, config_of, language_model, weighter_of

    torch.set_num_threads(1)
    before = resident()
    made, longest = material(setting), setting["longest"]
    if setting["pair"] != "embedded" and setting["lengths"] == "natural":
        longest = max(lognormal_lengths(setting["rollouts"], setting["mean"]))
    as_a_run()
    micro = setting["rows"] * (setting["prompt_tokens"] + longest)
    updates = Updates(
        student=language_model(made.student, made.tokenizer, "student"),
        teacher=language_model(made.teacher, made.tokenizer, "teacher"),
        prompts=made.prompt_ids(),
        max_response_tokens=setting["longest"],
        config=config_of(f"optim.lr={setting['lr']}", f"optim.micro_batch_tokens={micro}"),
        weighter=weighter_of(side),
    )
    measured = [updates.one() for _ in range(setting["updates"] + 1)][1:]
    return {"updates": measured, "imported": before, "peak": high_water()}


def run_side(setting: dict[str, Any], side: str, peer: str) -> dict[str, Any]:
    """Runs a side in a process of its own, and returns the medians of its updates."""
    here, text = Path(__file__).parent, json.dumps(setting)
    own = [sys.executable, __file__, "--child", side, text]
    command = [peer, str(here / "trl_update.py"), text] if side == "trl" else own
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ".", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: the side {side} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    names = (*PHASES, "total", "cpu", "tokens")
    medians = {name: statistics.median(update[name] for update in result["updates"]) for name in names}
    return medians | {"peak": result["peak"], "beyond_imports": result["peak"] - result["imported"]}


def has_trl(peer: str) -> bool:
    """Whether this Python has TRL."""
    try:
        return subprocess.run([peer, "-c", "import trl"], capture_output=True).returncode == 0
    except OSError:
        return False


# --- report -----------------------------------------------------------------------------------------------------------
def summary(repeats: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Per side its medians over repeats, and the ratio of plain to it: median, lowest and highest of the repeats."""
    sides = {
        side: {name: statistics.median(repeat[side][name] for repeat in repeats) for name in repeats[0][side]}
        for side in repeats[0]
    }
    for side in sides:
        for kind in ("total", "cpu"):
            ratios = sorted(repeat["plain"][kind] / repeat[side][kind] for repeat in repeats)
            sides[side][f"ratio_{kind}"] = [statistics.median(ratios), ratios[0], ratios[-1]]
    return sides


def table(results: dict[str, Any]) -> str:
    lines = [
        "Seconds of an update, and of its phases. A ratio is the time of `plain` to that of the side, with its range",
        "over repeats: by the clock, and by the processor, which other work on the machine disturbs less. Memory is",
        "the peak of the process in MiB, and what of it came after the imports.",
        "",
        "| pair and lengths | side | seconds | by the clock | by the processor | rollout | teacher | scoring | update "
        "| tokens/s | memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, sides in results["settings"].items():
        for side, figures in sides.items():
            ratios = " | ".join(
                "" if side == "plain" else "{:.2f} ({:.2f} to {:.2f})".format(*figures[f"ratio_{kind}"])
                for kind in ("total", "cpu")
            )
            phases = " | ".join(f"{figures[phase]:.3g}" for phase in PHASES)
            memory = f"{figures['peak'] / 2**20:.0f}, {figures['beyond_imports'] / 2**20:.0f}"
            lines.append(
                f"| {name} | {side} | {figures['total']:.3g} | {ratios} | {phases} "
                f"| {figures['tokens'] / figures['total']:.0f} | {memory} |"
            )
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of the phases, stacked, one for each side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = results["settings"]
    figure, axes = pyplot.subplots(1, len(settings), figsize=(3.2 * len(settings), 3.6), squeeze=False)
    for axis, (name, sides) in zip(axes[0], settings.items(), strict=True):
        bottom = [0.0] * len(sides)
        for phase in PHASES:
            heights = [figures[phase] for figures in sides.values()]
            axis.bar(list(sides), heights, bottom=bottom, label=phase)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axis.set_title(name.replace(", ", "\n"), fontsize=9)
    axes[0][0].set_ylabel("seconds of an update")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    cli = argparse.ArgumentParser()
    cli.add_argument("--quick", action="store_true", help="a toy pair, one repeat")
    cli.add_argument("--repeats", type=int, help="how often every side runs (3; with --quick 1)")
    cli.add_argument("--peer", default=".venv-bench/bin/python", help="a Python that has TRL")
    cli.add_argument("--out", type=Path, default=Path("outputs/bench_step"))
    cli.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = cli.parse_args()
    if options.child:
        print(json.dumps(own_updates(json.loads(options.child[1]), options.child[0])))
        return
    settings, begin = QUICK if options.quick else SETTINGS, time.monotonic()
    sides = SIDES if has_trl(options.peer) else SIDES[:-1]
    if sides != SIDES:
        say(begin, f"{options.peer} has no TRL, so only this trainer is measured")
    results = {"settings": {}, "repeats": {}, "given": settings}
    for name, setting in settings.items():
        repeats = []
        for number in range(options.repeats or (1 if options.quick else 3)):
            repeats.append({side: run_side(setting, side, options.peer) for side in sides})
            shown = ", ".join(f"{side} {figures['total']:.3g} s" for side, figures in repeats[-1].items())
            say(begin, f"{name}, repeat {number + 1}: {shown}")
        results["repeats"][name], results["settings"][name] = repeats, summary(repeats)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "table.md").write_text(table(results) + "\n")
    plot(results, options.out / "update.png")
    print(table(results))


def say(begin: float, text: str) -> None:
    print(f"[{(time.monotonic() - begin) / 60:.1f} min] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
