"""Tables as data, their statistics, and a small reproduction from command to page."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
from helpers import blob, evaluation_figures, response

from data.tiny import addition, build
from opd.accuracy import PROBLEMS_ONLY, SEEDS_AND_PROBLEMS, Interval
from opd.config import load_config
from opd.errors import InputError, RunError
from opd.grading import extract
from tip import arms, jobs, reproduce
from tip.results import comparison
from tip.results.collect import paired_difference
from tip.results.draw import families
from tip.results.markdown import what_is_covered

TABLES = sorted(path.stem for path in Path("configs/tables").glob("*.json"))
LABELS = ("all 1.0", "soft_or 0.5", "random 0.5")  # of the main job's arms
SMALL = [
    "--set",
    "optim.steps=2",
    "--set",
    "optim.warmup_steps=0",
    "--set",
    "eval.limit=6",
    "--set",
    "eval.k=1",
    "--set",
    "log.token_dump_every=2",
    "--set",
    "log.diagnostics_every=2",
]


@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_its_arms_the_random_control_and_the_papers_values(name):
    table = reproduce.read_table(name)
    labels = [arm.label for arm in table.arms]
    assert len({arm.slug for arm in table.arms}) == len(labels) and "all 1.0" in labels
    retentions = {arm.settings["tip.retention"] for arm in table.arms if arm.selects}
    assert {f"random {r:g}" for r in retentions} <= set(labels)
    if table.paper:
        for by_benchmark in comparison.paper()["tables"][table.paper]["pairs"].values():
            in_paper = next(iter(by_benchmark.values()))
            wanted = set(in_paper) & set(labels)
            assert len(wanted) >= 2 and (name in ("main", "table6") or wanted == set(in_paper))


def test_the_papers_values_are_the_papers():
    facts = comparison.paper()["tables"]
    assert facts["5"]["pairs"]["qwen3_8b_to_4b"]["math500"]["soft_or 0.5"] == [79.1, 0.8]
    assert facts["8"]["pairs"]["qwen3_8b_to_4b"]["aime25"]["divergence 0.1"] == [15.3, 1.1]
    assert facts["7"]["pairs"]["qwen3_14b_to_1.7b_deepplanning"]["deepplanning"]["q3 0.2"] == [12.6, 0.07]


def responses(folder, right):
    """An evaluation after update 60 whose greedy responses to some problems are right or not."""
    step = folder / "eval" / "step_000060"
    step.mkdir(parents=True)
    rows = [response(problem, -1, correct) for problem, correct in right.items()]
    (step / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (step / "summary.json").write_text(json.dumps({"bench": evaluation_figures()}))
    return folder


def test_differences_are_over_the_problems_that_all_seeds_have(tmp_path):
    base = {s: responses(tmp_path / f"base{s}", {"p": False, "q": False, "r": False, "only 0": False}) for s in (0, 1)}
    arm = {
        0: responses(tmp_path / "arm0", {"p": True, "q": False, "r": False, "only 0": True}),
        1: responses(tmp_path / "arm1", {"p": True, "q": True, "r": None}),
    }
    found = paired_difference(arm, base, 60, "bench", "greedy")
    assert found.by_seed == pytest.approx([1 / 3, 2 / 3]) and found.mean == pytest.approx(0.5)
    assert (found.wins, found.covers) == (2, "new seeds and new problems")
    assert found.low < 1 / 3 and found.high > 2 / 3
    alone = paired_difference({0: arm[0]}, {0: base[0]}, 60, "bench", "greedy")
    assert (alone.mean, len(alone.by_seed), alone.covers) == (0.5, 1, "problems only")
    assert paired_difference(arm, base, 60, "bench", "mean_at_k") is None
    other = responses(tmp_path / "other", {"only 0": True})
    with pytest.raises(
        InputError, match=r"bench at step_000060: got seeds of \[1, 3\] problems and none in all of them"
    ):
        paired_difference({0: other, 1: arm[1]}, base, 60, "bench", "greedy")


def test_the_text_says_what_the_intervals_cover():
    def text(*covers):
        return what_is_covered([Interval(0.0, -0.1, 0.1, kind, (0.0,), 8) for kind in covers])

    one, several = PROBLEMS_ONLY, SEEDS_AND_PROBLEMS
    assert text(several) == "a 95 % interval that covers new seeds and new problems"
    assert text(one) == "a 95 % interval over problems only (it says nothing about another training)"
    assert text(one, several).startswith(text(several)) and "one seed is compared" in text(one, several)
    assert "over problems only" in text(one, several)


@pytest.mark.parametrize("figure,table", [("figure1", "table5"), ("figure3", "table3"), ("figure4", "table7")])
def test_a_figure_is_a_view_of_a_table_and_shares_its_runs(figure, table, tmp_path):
    view, source = reproduce.read_table(figure), reproduce.read_table(table)
    assert view.arms == source.arms and view.panels == source.panels and view.title != source.title
    runs = [comparison.of_table(t, tmp_path, [0, 1], "tiny", ("s", "t")).folders for t in (view, source)]
    assert runs[0] == runs[1] and view.name == figure


@pytest.mark.parametrize(
    "options,message",
    [
        (["--table", "9"], "there is no table 'table9'"),
        (["--table", "main", "--seeds", "0,x"], "expected a whole number"),
        (["--table", "main", "--set", "tip.rule=q3"], "Leave it out"),
        (["--table", "main", "--arms", "q3 0.2"], "has no arm 'q3 0.2'"),
        (["--table", "main", "--seeds", "0,0"], "different seeds"),
        (["--table", "7"], "table7 compares conversations, and configs/tiny.json has no data.environment"),
    ],
)
def test_bad_input_is_named(options, message, tiny_pair):
    with pytest.raises(InputError, match=message):
        reproduce.command(["--config", "configs/tiny.json", "--dry-run", *options])


def test_a_small_reproduction_and_the_same_again(tiny_pair, tmp_path, capsys):
    command = ["--table", "main", "--config", "configs/tiny.json", *SMALL, "--set", f"output_dir={tmp_path}"]
    reproduce.command(command)
    out = tmp_path / "tiny-reproduce" / "main"
    first = (out / "table.json").read_text()
    found = json.loads(first)
    assert set(found["arms"]) == {"all 1.0", "soft_or 0.5", "random 0.5"} and not found["missing"]
    seed = tmp_path / "tiny-reproduce" / "seed_0"
    for arm in ("all-1.0", "soft_or-0.5"):  # one step-0 evaluation serves all arms
        assert (seed / arm / "eval" / "step_000000" / "summary.json").read_bytes() == next(
            seed.glob("start_*/step_000000/summary.json")
        ).read_bytes()
    assert (out / "table.csv").read_text().count("\n") == 7  # three arms, greedy and sampled
    assert "over problems only" in (out / "table.md").read_text() and "new seeds" not in (out / "table.md").read_text()
    assert "covers of all 1.0" in (out / "table.csv").read_text().splitlines()[0]
    text = (out / "report.html").read_text()
    assert "over problems only" in text and "cost: seconds per phase" in text
    assert (out / "table.md").read_text() in capsys.readouterr().out
    assert "<script" not in text and text.count("data:image/png") >= 5
    assert text.count("soft_or 0.5, update 2: ") == 3  # the quadrants, tokens and overlap are of the arm that selects
    assert 'href="tokens.html"' in text
    page = (out / "tokens.html").read_text()
    assert [run["name"] for run in json.loads(blob(page, "about"))["runs"]] == ["soft_or 0.5", "random 0.5", "all 1.0"]
    (seed / "soft_or-0.5" / "summary.json").unlink()  # as if it had been stopped before its end
    reproduce.command(command)
    assert (out / "table.json").read_text() == first


def test_a_curve_over_retention_starts_at_all_tokens_under_its_own_loss():
    table = reproduce.read_table("rules")
    settings = {arm.label: arm.settings for arm in table.arms}
    found = families(settings)
    mixed = "mixture=total_variation"
    assert found["q3"] == ["all 1.0", "q3 0.2", "q3 0.1"]
    assert found[f"q3 {mixed}"] == [f"all 1.0 {mixed}", f"q3 0.2 {mixed}", f"q3 0.1 {mixed}"]
    assert found["total_variation"] == [f"all 1.0 {mixed}", "total_variation 0.2", "total_variation 0.1"]
    assert found["total_variation mixture=none"][0] == "all 1.0" and not any(f.startswith("all") for f in found)


def test_chosen_arms_come_with_the_baseline():
    table = reproduce.only(reproduce.read_table("table5"), ["soft_or 0.2"])
    assert [arm.label for arm in table.arms] == ["all 1.0", "soft_or 0.2"] and len(table.panels) == 1


@pytest.mark.slow
def test_a_signal_stops_all_seeds_and_the_same_command_ends_like_an_unbroken_one(tiny_pair, tmp_path):
    command = [
        sys.executable,
        "-m",
        "tip.reproduce",
        "--table",
        "main",
        "--config",
        "configs/tiny.json",
        "--seeds",
        "0,1",
        "--jobs",
        "2",
        "--arms",
        "soft_or 0.5",
        "--set",
        "optim.steps=8",
        "--set",
        "eval.limit=8",
        "--set",
        "eval.k=1",
        "--set",
        f"student.path={shutil.copytree(tiny_pair / 'student', tmp_path / 'copy')}",
        "--set",
    ]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    with (tmp_path / "log").open("w") as log:
        child = subprocess.Popen([*command, f"output_dir={broken}"], stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while "all 1.0 is done" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 128 + signal.SIGTERM
    assert not (broken / "tiny-reproduce" / "main").exists()
    for out in (broken, whole):
        subprocess.run([*command, f"output_dir={out}"], check=True, capture_output=True)
    tables = []
    for out in (broken, whole):
        found = json.loads((out / "tiny-reproduce" / "main" / "table.json").read_text())
        assert not found["missing"]
        tables.append(
            {
                label: [arm["retained"], arm["mass_covered"], arm["evaluations"], arm["differences"]]
                for label, arm in found["arms"].items()
            }
        )
    assert tables[0] == tables[1]


def test_the_papers_values_stand_beside_the_papers_pair_alone(tmp_path):
    table, pair = reproduce.read_table("table5"), "qwen3_8b_to_4b"
    models = [load_config(f"configs/{pair}.json")[0].student.path, load_config(f"configs/{pair}.json")[0].teacher.path]
    assert comparison.of_table(table, tmp_path, [0], pair, tuple(models)).paper
    assert not comparison.of_table(table, tmp_path, [0], pair, ("mine", models[1])).paper
    assert not comparison.of_table(table, tmp_path, [0], "tiny", tuple(models)).paper
    table, pair = reproduce.read_table("table7"), "qwen3_32b_to_1.7b_deepplanning"
    theirs = comparison.of_table(table, tmp_path, [0], pair, ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-32B"))
    assert theirs.paper["deepplanning"]["all 1.0"] == [12.8, 0.07] and theirs.paper_metric == "share_at_k"
    ours = comparison.of_table(table, tmp_path, [0], "tiny_planning", ("s", "t"))
    assert not theirs.note and not ours.paper and "its values do not stand here" in ours.note


def test_a_failed_arm_is_reported_and_the_others_go_on(tiny_pair, tmp_path, monkeypatch, capsys):
    real = arms.train

    def failing(config, *rest):
        if "soft_or" in config.run_name:
            raise OSError("the disk is gone")
        return real(config, *rest)

    monkeypatch.setattr(arms, "train", failing)
    with pytest.raises(reproduce.RunError, match="1 of the runs failed"):
        reproduce.command(
            ["--table", "main", "--config", "configs/tiny.json", *SMALL, "--set", f"output_dir={tmp_path}"]
        )
    text = (tmp_path / "tiny-reproduce" / "main" / "table.md").read_text()
    assert "soft_or 0.5, seed 0: OSError: the disk is gone" in text and "random 0.5" in text


def test_the_second_task(tmp_path):
    import random

    rng, wrong, total = random.Random(0), 0, 2000
    for _ in range(total):
        text = addition.problem(rng)
        assert extract(addition.response(text, addition.TEACHER, rng)) == str(addition.answer(text))
        wrong += extract(addition.response(text, addition.STUDENT, rng)) != str(addition.answer(text))
    assert 0.35 < wrong / total < 0.65
    assert set(build.PAIRS) == {"chain", "addition", "planning", "planning_absolute", "hinted"}


class FakeChild:
    """Stands for a started process; ends at once."""

    started: ClassVar[list] = []  # (command, CUDA_VISIBLE_DEVICES)
    returncode = 0
    stdout = ()

    def __init__(self, command, env, **_):
        self.started.append((command[1:], env.get("CUDA_VISIBLE_DEVICES")))

    def wait(self, timeout):
        return self.returncode


def started(monkeypatch, tmp_path, *words):
    monkeypatch.setattr(jobs.subprocess, "Popen", FakeChild)
    monkeypatch.setattr(FakeChild, "started", [])
    arguments = ["--table", "main", "--config", "configs/tiny.json", "--set", f"output_dir={tmp_path}", *words]
    reproduce.command(arguments)
    return arguments, FakeChild.started


def test_with_deepspeed_every_arm_is_a_group_of_processes_and_one_that_fails_stops_no_other(
    tiny_pair, tmp_path, monkeypatch, capsys
):
    settings = ["--set", "engine.kind=deepspeed", "--set", "engine.deepspeed=zero2", "--seeds", "0,1", "--jobs", "2"]
    monkeypatch.setattr(FakeChild, "returncode", 1)
    monkeypatch.setattr(build, "student", lambda pair, seed, students: Path("data/tiny/pairs/chain/student"))
    with pytest.raises(RunError, match="6 of the runs failed"):
        started(monkeypatch, tmp_path, *settings)
    labels = [arm.label for arm in reproduce.read_table("main").arms]
    assert [(c[-3], c[-1]) for c, _ in FakeChild.started] == [(seed, label) for seed in "01" for label in labels]
    assert all(c[:3] == ["-m", "opd.launch", "tip.reproduce"] for c, _ in FakeChild.started)
    assert capsys.readouterr().err.count("ended with exit code 1; see ") == 6


def test_on_several_gpus_the_jobs_have_one_each(tiny_pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    arguments, children = started(monkeypatch, tmp_path, "--seeds", "0,1,2", "--jobs", "3")
    assert [command for command, _ in children] == [
        ["-m", "opd.launch", "tip.reproduce", *arguments, "--only-seed", str(seed)] for seed in range(3)
    ]
    gpus = [gpu for _, gpu in children]
    assert gpus[:2] == ["4", "7"] and gpus[2] in ("4", "7")  # whichever is free first


def test_a_table_is_not_started_by_a_launcher(tiny_pair, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(InputError, match="a table starts its own processes on all GPUs"):
        started(monkeypatch, tmp_path)


def test_with_fewer_seeds_than_jobs_the_arms_run_side_by_side(tiny_pair, tmp_path, monkeypatch, capsys):
    arguments, children = started(monkeypatch, tmp_path, "--jobs", "2")
    assert [command for command, _ in children] == [
        ["-m", "opd.launch", "tip.reproduce", *arguments, "--only-seed", "0", "--only-arm", arm] for arm in LABELS
    ]
    logs = tmp_path / "tiny-reproduce" / "logs"
    assert sorted(p.name for p in logs.iterdir()) == [
        f"seed_0-{a}.log" for a in ("all-1.0", "random-0.5", "soft_or-0.5")
    ]
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == [
        "Main job: Soft-OR 50 % against all tokens: 3 runs",
        "  data/tiny/pairs/chain/student learns from data/tiny/pairs/chain/teacher",
        f"  into {tmp_path / 'tiny-reproduce'}",
    ]
    assert said[3:7] == [f"the messages of each job go to {logs}", *(f"seed 0: {arm} started" for arm in LABELS)]
