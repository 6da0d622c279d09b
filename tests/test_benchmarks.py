"""The benchmarks at toy sizes: they run, and what they write holds what it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_step import QUICK, has_trl, run_side, summary
from check_gpu import CHECKS, judge
from child import in_child
from random_models import END, TOY_STUDENT, NoEnd, classed_prompts, lognormal_lengths, material, random_model
from updates import Updates, config_of, language_model, weighter_of

HERE = Path("tests/benchmarks")
PEER = ".venv-bench/bin/python"
NATURAL = QUICK["toy pair, natural lengths"]


def run(name, *words):
    command = [sys.executable, str(HERE / name), *map(str, words)]
    environment = {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def updates_of(setting):
    made = material(setting)
    student, teacher = (
        language_model(m, made.tokenizer, n) for m, n in ((made.student, "student"), (made.teacher, "t"))
    )
    return Updates(student, teacher, made.prompt_ids(), setting["longest"], config_of(), weighter_of("plain"))


# responses that end where they are told


def test_responses_have_the_prescribed_lengths_however_they_are_batched():
    updates = updates_of(NATURAL)
    expected = lognormal_lengths(8, 4)
    for together in (8, 3):
        updates.sampler.batch_size = together
        responses = [rollout.response_ids for rollout in updates.rollouts(1)]
        assert [len(ids) for ids in responses] == expected
        assert all(ids[-1] == END and END not in ids[:-1] for ids in responses)


def test_a_text_of_ids_is_read_as_these_ids():
    made = material(NATURAL)
    assert made.prompt_ids() == classed_prompts(8, 4, TOY_STUDENT.vocab)


def test_generate_ends_them_at_the_same_lengths():
    """TRL samples with transformers' generate."""
    made = material(NATURAL)
    made.tokenizer.padding_side = "left"
    inputs = made.tokenizer(made.prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    texts = made.student.generate(**inputs, max_new_tokens=32, do_sample=True)[:, inputs["input_ids"].shape[1] :]
    assert [1 + ids.tolist().index(END) for ids in texts] == lognormal_lengths(8, 4)


def test_lengths_are_spread_as_those_of_a_lognormal():
    lengths = sorted(lognormal_lengths(1000, 100))
    assert lengths[500] == pytest.approx(100 * 2.718281828**-0.5, rel=0.02)  # the median is mean / sqrt(e)
    assert lengths[-1] == 800 and sum(lengths) / 1000 == pytest.approx(100, rel=0.05)


def test_equal_lengths_reach_the_limit():
    updates = updates_of({**NATURAL, "lengths": "equal", "longest": 6})
    assert {len(rollout.response_ids) for rollout in updates.rollouts(1)} == {6}


def test_the_hooks_leave_the_training_alone():
    plain, hooked = random_model(TOY_STUDENT, 0), random_model(TOY_STUDENT, 0)
    hooked.register_forward_hook(NoEnd(END), with_kwargs=True)
    ids = torch.arange(2, 10)[None]
    assert torch.equal(plain(input_ids=ids, use_cache=False).logits, hooked(input_ids=ids, use_cache=False).logits)


# children


def test_a_child_answers_or_says_why_not():
    assert in_child(lambda: {"a": [1, 2]}) == {"value": {"a": [1, 2]}}
    assert in_child(lambda: 1 / 0) == {"error": "ZeroDivisionError: division by zero"}
    assert "exit code -9" in in_child(lambda: __import__("os").kill(__import__("os").getpid(), 9))["error"]
    assert in_child(lambda: __import__("time").sleep(60), 0.1)["error"].startswith("it did not end within")


# the commands


def test_bench_step_measures_both_rules_of_this_trainer(tmp_path):
    done = run("bench_step.py", "--quick", "--peer", tmp_path / "none", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "has no TRL, so only this trainer is measured" in done.stderr
    sides = json.loads((tmp_path / "results.json").read_text())["settings"]["toy pair, natural lengths"]
    assert sides.keys() == {"plain", "soft_or"} and (tmp_path / "update.png").stat().st_size > 1000
    for figures in sides.values():
        assert figures["tokens"] == sum(lognormal_lengths(8, 4)) and figures["peak"] > figures["beyond_imports"] > 0
    assert sides["soft_or"]["score"] > sides["plain"]["score"]
    assert "| toy pair, natural lengths | soft_or |" in (tmp_path / "table.md").read_text()


def test_trl_trains_on_the_same_lengths():
    if not has_trl(PEER):
        pytest.skip(f"{PEER} has no TRL: bash scripts/setup.sh --peers")
    figures = run_side(NATURAL, "trl", PEER)
    assert figures["tokens"] == sum(lognormal_lengths(8, 4))
    assert 0 < figures["rollout"] + figures["teacher"] < figures["total"]


def test_a_ratio_is_the_median_of_those_of_a_repeat():
    repeats = [
        {"plain": {"total": p, "cpu": 1.0}, "trl": {"total": t, "cpu": 2.0}} for p, t in ((1, 2), (3, 2), (8, 2))
    ]
    assert summary(repeats)["trl"]["ratio_total"] == [1.5, 0.5, 4.0]
    assert summary(repeats)["trl"]["ratio_cpu"] == [0.5, 0.5, 0.5]


def test_bench_memory_shows_what_full_logits_cost(tmp_path):
    done = run("bench_memory.py", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert not [cell for cell in cells if "left_out" in cell]
    peak = {(c["question"], c["tokens"], c["share"], c["way"]): c["peak"] for c in cells}
    assert peak["tokens", 1024, 1.0, "ours"] < peak["tokens", 1024, 1.0, "full logits"]
    assert {question for question, *_ in peak} == {"shares", "tokens", "lengths"}
    assert (tmp_path / "memory.png").stat().st_size > 1000 and "| lengths | 256 |" in (
        tmp_path / "table.md"
    ).read_text()


def test_check_gpu_passes_at_toy_sizes(tmp_path):
    names = [check.name for check in CHECKS if check.name != "resume"]
    done = run("check_gpu.py", "--toy", "--only", ",".join(names), "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["checks"]) == names and results["machine"]["cores"]
    skipped = {name for name, result in results["checks"].items() if result["status"] == "skipped"}
    assert skipped <= {"products"} and done.stdout.strip() == (tmp_path / "table.md").read_text().strip()
    assert len(results["checks"]["loss"]["judged"]) == 20


@pytest.mark.slow
def test_check_gpu_stops_and_continues_a_run(tmp_path):
    done = run("check_gpu.py", "--toy", "--only", "resume", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results.json").read_text())["checks"]["resume"]
    assert result["status"] == "passed" and result["figures"]["exit code of the run that was stopped"] == 143


def test_check_gpu_fails_by_its_exit_code_and_skips_what_does_not_fit(tmp_path):
    judged = judge({"value": {"figures": {}, "judged": {"error": (float("nan"), 1.0), "other": (0.5, 1.0)}}}, 1.0, 5.0)
    assert judged["status"] == "failed" and judged["reason"] == "error is nan, at most 1"
    assert judge({"error": "it did not end within 5 s"}, 5.0, 5.0)["status"] == "skipped"
    assert judge({"error": "MemoryError"}, 1.0, 5.0)["status"] == "failed"
    assert judge({"value": {"skipped": "the package x is missing"}}, 1.0, 5.0)["status"] == "skipped"
    done = run("check_gpu.py", "--only", "nothing", "--out", tmp_path)
    assert done.returncode == 2 and "expected names out of" in done.stderr
