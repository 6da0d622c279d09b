"""Whole runs on the embedded pair: what they gain, write, and refuse. One run per arm serves most tests."""

import html
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd import cli
from opd.errors import InputError
from tip import report
from tip import train as tip_train
from tip.results.markdown import markdown
from tip.results.runs import read_run

SMALL = (
    "optim.steps=4",
    "optim.warmup_steps=1",
    "eval.k=1",
    "eval.limit=8",
    "eval.every=2",
    "checkpoint.every=2",
    "log.diagnostics_every=2",
)


def start(out, name, *overrides, tip=(), resume="auto"):
    return runs.train(out, f"run_name={name}", *overrides, *tip, resume=resume, plain=not tip)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clock(record):
    """Figures of a run that repeat: everything but seconds and memory."""
    if isinstance(record, dict):
        return {
            k: without_clock(v) for k, v in record.items() if not k.startswith(("time/", "memory/", "seconds", "peak"))
        }
    return [without_clock(v) for v in record] if isinstance(record, list) else record


@pytest.fixture(scope="module")
def arms(tiny_pair, tmp_path_factory):
    """Both arms of the main job, evaluated at both ends on half of the problems."""
    out, less = tmp_path_factory.mktemp("arms"), ("eval.every=0", "eval.limit=256")
    return start(out, "all", *less), start(out, "soft_or", *less, tip=("tip.rule=soft_or", "tip.retention=0.5"))


@pytest.fixture(scope="module")
def small(tiny_pair, tmp_path_factory):
    """A Soft-OR run of four updates."""
    return start(tmp_path_factory.mktemp("small"), "small", *SMALL, tip=("tip.retention=0.2",))


def test_both_arms_gain_fifteen_points(arms):
    for folder in arms:
        evals = json.loads((folder / "summary.json").read_text())["eval"]
        assert evals["teacher"]["tiny"]["greedy"] >= 0.95
        assert evals["final"]["tiny"]["greedy"] >= evals["step_0"]["tiny"]["greedy"] + 0.15
        assert evals["final"]["tiny"]["mean_at_k"] >= evals["step_0"]["tiny"]["mean_at_k"] + 0.15


def test_arms_start_alike_and_soft_or_keeps_half_of_the_tokens_and_most_of_the_divergence(arms):
    baseline, soft_or = (rows(folder) for folder in arms)
    assert baseline[0]["tokens/response"] == soft_or[0]["tokens/response"]
    assert all(r["tokens/kept"] == r["tokens/response"] for r in baseline)
    assert all(0.45 < r["tip/retained"] <= 0.5 and r["tip/mass_covered"] > 0.85 for r in soft_or)
    assert "tip/mass_covered" not in baseline[0] and baseline[9]["divergence/reverse_kl"] > 0  # diagnostics on step 10


def test_the_report_compares_them(arms, tmp_path):
    text = markdown(report.results_of([read_run(folder) for folder in arms]))
    for word in (
        "step-0 student",
        "teacher",
        "all tokens",
        "soft_or 0.5",
        "mean@4",
        "100.0 %",
        "256 problems",
        *map(str, arms),
    ):
        assert word in text
    other = start(tmp_path, "short", *SMALL)
    with pytest.raises(InputError, match="differ in benchmark tiny"):
        report.results_of([read_run(arms[0]), read_run(other)])
    with pytest.raises(InputError, match="Expected what a run was started with"):
        read_run(tmp_path)


def test_a_run_folder_holds_what_it_should(small):
    names = {str(p.relative_to(small)) for p in small.rglob("*") if p.is_file()}
    assert {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "eval/teacher/tiny.jsonl",
        "eval/teacher/summary.json",
        "eval/step_000000/summary.json",
        "eval/step_000002/tiny.jsonl",
        "eval/step_000004/summary.json",
        "checkpoints/latest",
        "checkpoints/step_000004/model.safetensors",
        "checkpoints/step_000004/manifest.json",
        "checkpoints/step_000004/trainer/optimizer.safetensors",
    } <= names
    assert any(name.startswith("tensorboard/events") for name in names)
    recorded = json.loads((small / "config.json").read_text())
    assert recorded["config"]["tip"]["retention"] == 0.2 and recorded["weighter"] == "tip.weighter.TipWeighter"
    assert recorded["versions"]["torch"] and "git_commit" in recorded and recorded["command"]
    lines = (small / "eval/step_000004/tiny.jsonl").read_text().splitlines()
    response = next(row for row in map(json.loads, lines) if row["sample"] == 0)
    assert set(response) == {
        "id",
        "sample",
        "prompt",
        "response",
        "extracted",
        "answer",
        "correct",
        "vote",
        "finish_reason",
        "tokens",
        "reverse_kl",
        "acceptance",
        "accepted_of_4",
    }
    assert [r["step"] for r in rows(small)] == [1, 2, 3, 4]
    wanted = {
        "loss/divergence",
        "tokens/response",
        "tokens/kept",
        "tip/retained",
        "tip/share_q1",
        "tip/mass_q4",
        "tip/kept_q3",
        "tip/mass_covered",
        "tip/threshold_entropy",
        "tip/threshold_divergence",
        "rollout/length_mean",
        "rollout/truncated",
        "rollout/accuracy",
        "optim/lr",
        "optim/grad_norm",
        "time/rollout",
        "time/teacher",
        "time/score",
        "time/update",
        "memory/peak_gb",
    }
    assert all(wanted <= set(r) for r in rows(small)) and "student/entropy" in rows(small)[1]


def test_soft_or_at_a_fifth_covers_most_of_the_divergence_at_the_start(small):
    assert rows(small)[0]["tip/mass_covered"] > 0.75  # .90; entropy covers a third, chance a fifth


def test_tensorboard_has_the_metrics_and_sample_rollouts(small):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(small / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"loss/divergence", "eval/tiny/greedy", "tip/share_q3"} <= set(tags["scalars"])
    assert "rollout/0/text_summary" in tags["tensors"]
    assert [e.step for e in events.Scalars("loss/divergence")] == [1, 2, 3, 4]


def test_a_checkpoint_is_a_plain_model_with_its_tokenizer(small):
    folder = small / "checkpoints" / (small / "checkpoints" / "latest").read_text().strip()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert folder.name == "step_000004" and model.dtype == torch.float32
    start_model = AutoModelForCausalLM.from_pretrained("data/tiny/pairs/chain/student")
    assert not torch.equal(model.model.norm.weight, start_model.model.norm.weight)
    assert model.generation_config.eos_token_id == start_model.generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(folder).chat_template
    moments = load_file(folder / "trainer/optimizer.safetensors")
    assert {k.split(".")[0] for k in moments} == {"exp_avg", "exp_avg_sq", "step"} and moments[
        "step.model.norm.weight"
    ] == 4


def test_the_same_configuration_gives_the_same_run_bit_for_bit(small, tmp_path):
    again = start(tmp_path, "small", *SMALL, tip=("tip.retention=0.2",))
    assert without_clock(rows(again)) == without_clock(rows(small))
    a, b = (load_file(f / "checkpoints/step_000004/model.safetensors") for f in (small, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    for name in ("eval/teacher/tiny.jsonl", "eval/step_000004/tiny.jsonl"):
        assert (again / name).read_bytes() == (small / name).read_bytes()


def test_micro_batches_and_generation_batches_do_not_change_the_run(small, tmp_path):
    other = start(
        tmp_path, "cut", *SMALL, "rollout.batch_size=5", "optim.micro_batch_tokens=200", tip=("tip.retention=0.2",)
    )
    for a, b in zip(rows(other), rows(small), strict=True):
        assert a["loss/divergence"] == pytest.approx(b["loss/divergence"], rel=1e-4)
        assert a["tokens/response"] == b["tokens/response"] and a["rollout/accuracy"] == b["rollout/accuracy"]


def test_only_the_newest_checkpoints_stay(tiny_pair, tmp_path):
    folder = start(tmp_path, "keep", *SMALL, "checkpoint.every=1", "checkpoint.keep=2", "eval.every=0")
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["latest", "step_000003", "step_000004"]


def test_a_complete_run_is_left_alone_and_another_configuration_is_refused(small, capsys):
    before = {p: p.stat().st_mtime_ns for p in small.rglob("*") if p.is_file()}
    out = small.parent
    assert start(out, "small", *SMALL, tip=("tip.retention=0.2",)) == small
    assert "complete" in capsys.readouterr().err
    assert (
        start(out, "small", *SMALL, "rollout.timeout=5", tip=("tip.retention=0.2",)) == small
    )  # where vLLM is, or how patient
    with pytest.raises(InputError, match=r"differs in optim.lr \(there 0.0003, here 0.1\); tip.retention"):
        start(out, "small", *SMALL, "optim.lr=0.1", tip=("tip.retention=0.1",))
    with pytest.raises(InputError, match="differs in tip"):
        start(out, "small", *SMALL)
    with pytest.raises(InputError, match="--resume none"):
        start(out, "small", *SMALL, tip=("tip.retention=0.2",), resume="none")
    assert {p: p.stat().st_mtime_ns for p in small.rglob("*") if p.is_file()} == before


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="not a run folder"):
        start(tmp_path, "mine", *SMALL)


def forked_command(arguments, log):
    """Gives the training command in a forked child; returns its process id."""

    def command():
        sys.argv = ["tip.train", *arguments]
        cli.main(tip_train.command)

    return runs.forked(command, log)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_with_a_checkpoint_and_the_same_command_continues(tiny_pair, tmp_path, signum):
    overrides = ("optim.steps=12", "eval.k=1", "eval.limit=8", "checkpoint.every=100", "eval.every=0")
    arguments, log = ["--config", "configs/tiny.json"], tmp_path / "log"
    for text in (f"output_dir={tmp_path}", "run_name=stopped", *overrides):
        arguments += ["--set", text]
    child = forked_command(arguments, log)
    deadline = time.monotonic() + 60
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signum)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signum
    assert "the same command continues" in log.read_text() and "Traceback" not in log.read_text()
    folder = tmp_path / "stopped"
    assert (folder / "checkpoints" / "latest").exists() and not (folder / "summary.json").exists()
    again = forked_command(arguments, log)
    assert os.waitstatus_to_exitcode(os.waitpid(again, 0)[1]) == 0, log.read_text()
    assert "continuing after step" in log.read_text() and log.read_text().endswith(f"{folder}\n")
    whole = start(tmp_path, "whole", *overrides, tip=("tip.retention=0.5",))
    assert without_clock(rows(folder)) == without_clock(rows(whole))
    a, b = (load_file(f / "checkpoints/step_000012/trainer/optimizer.safetensors") for f in (folder, whole))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_plain_training_refuses_a_tip_section_on_the_command_line():
    result = subprocess.run(
        [sys.executable, "-m", "opd.train", "--config", "configs/tiny.json", "--set", "tip.rule=all"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    assert result.stdout == "" and len(result.stderr.strip().splitlines()) == 1


def test_evaluation_from_the_command_line(tiny_pair, tmp_path):
    command = [
        sys.executable,
        "-m",
        "opd.evaluate",
        "--config",
        "configs/tiny.json",
        "--model",
        "data/tiny/pairs/chain/teacher",
        "--limit",
        "16",
        "--out",
        str(tmp_path),
        "--set",
        "eval.k=2",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'summary.json'}\n" and "mean@2" in result.stderr
    figures = json.loads((tmp_path / "summary.json").read_text())["tiny"]
    assert figures["problems"] == 16 and figures["k"] == 2 and figures["greedy"] >= 0.9
    assert figures["grader"] and figures["benchmark"]["version"] == 1 and figures["benchmark"]["temperature"] == 1.0
    assert len((tmp_path / "tiny.jsonl").read_text().splitlines()) == 48


def test_a_finished_run_that_continues_from_an_older_checkpoint_forgets_its_future(tiny_pair, tmp_path):
    folder = start(tmp_path, "back", *SMALL, "checkpoint.every=1", "checkpoint.keep=9")
    expected = without_clock(json.loads((folder / "summary.json").read_text()))
    older = folder / "checkpoints" / "step_000001"
    (folder / "eval/step_000004/tiny.jsonl").write_text("stale")
    assert start(tmp_path, "back", *SMALL, "checkpoint.every=1", "checkpoint.keep=9", resume=str(older)) == folder
    assert without_clock(json.loads((folder / "summary.json").read_text())) == expected
    assert (folder / "eval/step_000004/tiny.jsonl").read_text() != "stale"
    other = start(tmp_path, "other", *SMALL, "seed=1")
    with pytest.raises(InputError, match="does not stand in"):
        start(
            tmp_path,
            "back",
            *SMALL,
            "checkpoint.every=1",
            "checkpoint.keep=9",
            resume=str(other / "checkpoints/step_000002"),
        )


def test_a_run_whose_benchmark_changed_is_another_run(tiny_pair, tmp_path):
    benchmark = json.loads(Path("configs/benchmarks/tiny.json").read_text())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(benchmark))
    texts = ("optim.steps=1", "optim.warmup_steps=0", "eval.k=1", "eval.limit=4", f'eval.benchmarks=["{path}"]')
    start(tmp_path, "run", *texts)
    path.write_text(json.dumps(benchmark | {"version": 2}))
    with pytest.raises(InputError, match=r"differs in benchmarks.mine.version \(there 1, here 2\)"):
        start(tmp_path, "run", *texts)


def test_runs_that_did_not_start_alike_are_not_compared(small, tmp_path):
    other = start(tmp_path, "other", *SMALL, "seed=1")
    with pytest.raises(InputError, match=r"differ in seed \(1 and 0\)"):
        report.results_of([read_run(small), read_run(other)])


def test_an_example_is_one_problem_before_and_after(small):
    text = report.example([read_run(small)])
    assert text.startswith("problem test-") and text.count("greedy,") == 3 and "step-0 student, greedy" in text
    first = text[text.index("step-0 student") :].splitlines()[0]
    assert first.endswith("not right")


def test_a_report_in_a_folder_holds_the_example(small, tmp_path, capsys):
    report.command([str(small), "--example", "--out", str(tmp_path)])
    page, printed = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == printed
    response = printed[printed.index("step-0 student, greedy") :].split("\n\n")[1].strip().splitlines()[0]
    assert f"<pre>{html.escape(response)}" in page


def test_the_main_script_handles_its_arguments(tiny_pair):
    command = ["bash", "scripts/run_math500_soft_or.sh", "configs/tiny.json", "--dry-run", "--set", "output_dir=mine"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "3 arms x 1 seeds: all 1.0, soft_or 0.5, random 0.5" in result.stderr
    assert "plan of mine/tiny:" in result.stdout and result.stdout.count("nothing was started") == 1


def test_held_out_prompts_are_evaluated_beside_the_benchmarks(tiny_pair, tmp_path):
    folder = start(tmp_path, "held", *SMALL, "data.validation=5")
    for name in ("teacher", "step_000000", "step_000004"):
        figures = json.loads((folder / "eval" / name / "summary.json").read_text())
        assert set(figures) == {"tiny", "validation"} and figures["validation"]["problems"] == 5
        assert figures["validation"]["k"] == 1 and figures["validation"]["benchmark"]["max_response_tokens"] == 40
