"""opd.doctor and --dry-run: every mistake that a run would find is found before it, and nothing is written."""

import pytest
import torch
from runs import words

from opd import doctor, plan
from opd.errors import InputError
from tip import train

FAULTS = {  # settings -> what is to be mended, as --dry-run and the doctor say it
    "missing field": (["data.prompt_field=nothing"], "no field 'nothing'"),
    "missing file": (['data.train=["nothing.jsonl"]'], "nothing.jsonl"),
    "answer of a benchmark": (['eval.benchmarks=["nothing"]'], "no benchmark 'nothing'"),
    "long prompts": (["data.max_prompt_tokens=4"], "longer than data.max_prompt_tokens = 4"),
    "context": (["rollout.max_response_tokens=200"], "context of 128"),
    "no student": (["student.path=nothing"], "no such folder"),
    "no teacher": (["teacher.path=nothing"], "no such folder"),
    "no update": (["optim.steps=null", "data.epochs=1", "rollout.prompts_per_step=100000"], "not one update"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_dry_run_finds_what_the_run_would_find(name, tmp_path, capsys):
    settings, message = FAULTS[name]
    with pytest.raises(InputError, match=message):
        train.command([*words(f"output_dir={tmp_path}/o", *settings), "--dry-run"])
    assert not (tmp_path / "o").exists() and "plan of" not in capsys.readouterr().out


@pytest.mark.parametrize("name", FAULTS)
def test_the_doctor_names_what_to_mend(name, tmp_path, capsys):
    settings, message = FAULTS[name]
    with pytest.raises(InputError, match=r"is not ready: mend .+\. The lines above say how\."):
        doctor.command(words(f"output_dir={tmp_path}/o", *settings))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("mend  ") and message in line for line in lines), lines
    assert "ready" not in lines and not (tmp_path / "o").exists()


def test_the_doctor_says_that_a_pair_is_ready(tmp_path, capsys):
    doctor.command(words(f"output_dir={tmp_path}/o", "data.validation=8"))
    text = capsys.readouterr().out
    assert text.endswith("\nready\n") and "mend" not in text and not (tmp_path / "o").exists()
    for part in (
        "student: Qwen3ForCausalLM, 0.11 M parameters",
        "training data: 8184 prompts",
        "held out as benchmark validation: 8",
        "35 shared token ids",
        "KL(student || student) is at most 0 nats, KL(student || teacher) 0.",
        "memory: phase ",
        "disk: ",
    ):
        assert part in text, part


def test_the_doctor_finds_several_faults_at_once(tmp_path, capsys):
    settings = ["student.path=nothing", "data.answer_field=nothing", f"output_dir={tmp_path}"]
    with pytest.raises(InputError, match=r"mend file data/tiny/pairs/chain/train\.jsonl, student"):
        doctor.command(words(*settings))
    assert "ok    teacher: " in capsys.readouterr().out


def test_a_plan_that_does_not_fit_is_a_fault(tmp_path, monkeypatch, capsys):
    of_plan = plan.plan_of

    def huge(*arguments):
        needed = of_plan(*arguments)
        needed.phases["update"]["activations"] = 2**60
        return needed

    monkeypatch.setattr(plan, "plan_of", huge)
    with pytest.raises(InputError, match="mend memory"):
        doctor.command(words(f"output_dir={tmp_path}"))
    text = capsys.readouterr().out
    assert "phase update takes" in text and "With --set optim.micro_batch_tokens=1024 the update takes" in text


def test_a_student_that_differs_from_itself_is_a_fault(tmp_path, monkeypatch, capsys):
    scored = doctor.score_update

    def shifted(pair, *arguments):
        stats = scored(pair, *arguments)
        stats.reverse_kl.add_(torch.tensor(1e-2))
        return stats

    monkeypatch.setattr(doctor, "score_update", shifted)
    with pytest.raises(InputError, match="mend scoring"):
        doctor.command(words(f"output_dir={tmp_path}"))
    assert "between the student and itself is 0.01 nats" in capsys.readouterr().out


def test_a_dry_run_says_where_a_run_would_continue(tmp_path, capsys):
    settings = [f"output_dir={tmp_path}", "optim.steps=2", "optim.warmup_steps=0", "eval.benchmarks=[]"]
    train.command([*words(*settings), "--dry-run"])
    assert "folder: " in (text := capsys.readouterr().out) and "a new run" in text
    train.command(words(*settings))
    train.command([*words(*settings), "--dry-run"])
    assert "the run in it is complete" in capsys.readouterr().out
    with pytest.raises(InputError, match="another configuration"):
        train.command([*words(*settings, "seed=1"), "--dry-run"])
