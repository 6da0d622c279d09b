"""The pair `hinted`, whose student teaches itself: every rule makes an update on it, and an analysis compares them."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd import train as training
from opd.config import load_config
from opd.record import dump
from tip import analyze
from tip.config import SECTIONS
from tip.diagnostics import TipObserver
from tip.results.token_map import page_of
from tip.rules import RULES
from tip.weighter import TipWeighter

CONFIG, PAIR = "configs/tiny_self.json", Path("data/tiny/pairs/hinted")
RETENTION = 0.2
SMALL = ("optim.steps=1", "optim.warmup_steps=0", "rollout.prompts_per_step=8", "eval.benchmarks=[]")
SMALL += ("log.token_dump_every=1", "log.token_dump_rollouts=8", "log.diagnostics_every=1")


def trained(out, *settings):
    """The folder of a run of one update on this pair, which dumps all of its tokens."""
    config, sections = load_config(CONFIG, [f"output_dir={out}", "run_name=run", *SMALL, *settings], SECTIONS)
    weighter = TipWeighter(sections["tip"])
    return training.run(config, weighter, sections, observer=TipObserver(weighter))


@pytest.mark.filterwarnings("ignore:.*no token has weight")
@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_makes_an_update(rule, tmp_path):
    folder = trained(tmp_path, f"tip.rule={rule}", f"tip.retention={RETENTION}")
    (row,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    dumped = dump.read(folder / "tokens" / "step_000001.jsonl")
    kept = [sum(weight > 0 for weight in line["weight"]) for line in dumped]
    assert sum(kept) == row["tokens/kept"] and row["tokens/response"] == sum(len(line["tokens"]) for line in dumped)
    expected = [math.floor(RETENTION * len(line["tokens"]) + 1e-9) for line in dumped]
    if RULES[rule].mechanic != "weights" and RULES[rule].budget == "per_rollout":
        assert kept == expected
    elif RULES[rule].mechanic != "weights":
        assert sum(kept) == math.floor(RETENTION * row["tokens/response"] + 1e-9)
    before = load_file(PAIR / "student" / "model.safetensors")
    after = load_file(folder / "checkpoints" / "step_000001" / "model.safetensors")
    moved = [name for name, tensor in before.items() if not torch.equal(tensor.float(), after[name])]
    if rule == "first_turns":  # a response without an environment has one turn, which is its last
        assert row["loss/divergence"] == row["tokens/kept"] == 0 and not moved
    else:
        assert row["loss/divergence"] > 0 and row["optim/grad_norm"] > 0 and row["tokens/kept"] > 0 and moved
    # the hint stands in the prompt of the teacher, behind the problem, and nowhere else
    hints = {row["problem"]: row["hint"] for row in map(json.loads, (PAIR / "train.jsonl").read_text().splitlines())}
    for line in dumped:
        problem = line["prompt"].split("\n")[1].removesuffix("<|im_end|>")
        assert line["teacher_prompt"] == line["prompt"].replace(problem, f"{problem}\n{hints[problem]}")
        assert set(line["verdict"]) <= {0.0, 1.0} and len(line["verdict"]) == len(line["tokens"])
    assert "</html>" in page_of({"run": folder}, rule)


def test_an_analysis_compares_all_rules_on_the_two_contexts(tmp_path, capsys):
    options = ["--prompts", "12", "--oracle-tokens", "60", "--teacher-topk", "2"]
    analyze.command(["--config", CONFIG, *options, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out + "\n"
    assert {label.partition("@")[0] for label in found["rules"]} == set(RULES)
    assert found["means"]["reverse_kl"] > 0.05  # of one model with itself: its two contexts differ
    covered = {label: rule["covered"]["reverse_kl"] for label, rule in found["rules"].items()}
    assert covered["divergence@0.1"] >= covered["soft_or@0.1"] and covered["divergence@0.1"] > covered["random@0.1"]
    assert found["oracle"]["tokens"] > 0 and found["partial_teacher"]
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("coverage", "overlap_0.1", "quadrants"))


@pytest.mark.parametrize("weights", [("live",), ("ema", "teacher.decay=0.9")])
def test_before_an_update_all_three_teachers_are_the_same(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "plots", lambda *_: {})  # they take most of the time
    monkeypatch.setattr(analyze, "page", lambda *_: "")
    found = []
    for name, settings in (("initial", ()), (weights[0], (f"teacher.weights={weights[0]}", *weights[1:]))):
        changed = [word for setting in settings for word in ("--set", setting)]
        options = ["--prompts", "6", "--oracle-tokens", "0", "--out", str(tmp_path / name)]
        analyze.command(["--config", CONFIG, *options, *changed])
        found.append(json.loads((tmp_path / name / "analysis.json").read_text()))
    assert found[0]["means"] == found[1]["means"] and found[0]["rules"] == found[1]["rules"]
