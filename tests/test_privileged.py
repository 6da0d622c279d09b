"""Privileged prompts: templates, places, what happens to rows that have none, and what a configuration refuses."""

import json
import re
from dataclasses import replace

import pytest
import runs
from helpers import random_lm, tiny_config

from data.tiny import task
from opd import privileged
from opd.benchmarks import Benchmark, LoadedBenchmark
from opd.data import make_prompts, read_problems
from opd.doctor import dry_run, examine
from opd.errors import InputError
from opd.hooks import UniformWeighter

SECTION = {"template": "answer {answer}", "role": "user", "missing": "error", "max_tokens": 40}
SELF = ("teacher.mode=self", "teacher.path=null", "teacher.weights=initial")
BENCHMARK = {"version": 1, "prompt_field": "problem", "answer_field": "answer", "instruction": "", "greedy": True}
BENCHMARK |= {"k": 0, "temperature": 1.0, "top_p": 1.0, "max_response_tokens": 20, "answer_lines": False}


def with_prompt(*more, **changes):
    return tiny_config(*SELF, f"data.teacher_prompt={json.dumps(SECTION | changes)}", *more)


@pytest.fixture
def rows(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"problem": f"1+{i} mod10?"} | row) + "\n" for i, row in enumerate(rows)))
        return str(path)

    return write


def read(source, config, answer_field="answer"):
    lm = random_lm(1)
    prompts = make_prompts(read_problems(source, "problem", answer_field), lm.tokenizer, config.data, source)
    return lm, prompts


def taught(source, config, teacher=None):
    """The training prompts of a source, and as text what the teacher reads of each."""
    lm, prompts = read(source, config)
    data = replace(config.data, train=(source,))
    prompts = privileged.for_training(prompts, config, data, lm, teacher or lm)
    return prompts, [lm.tokenizer.decode(prompt.teacher_ids) for prompt in prompts]


def test_a_template_by_hand():
    template = privileged.read_template("a {x} b {{c}} {long name.y}")
    assert template.fields == ["x", "long name.y"]
    assert template.fill({"x": 3, "long name.y": "{x}"}, "here") == "a 3 b {c} {x}"  # a value is no template
    for lacking in ({"x": 3}, {"x": None, "long name.y": "1"}, {"x": " \n", "long name.y": "1"}):
        assert template.fill(lacking, "here") is None
    assert privileged.read_template("no field").fill({}, "here") == "no field"


@pytest.mark.parametrize("text", ["{", "}", "{}", "{x!r}", "{x:>3}", "{ }"])
def test_braces_that_name_no_field_are_refused(text):
    with pytest.raises(InputError, match=r"data.teacher_prompt.template.*written twice"):
        privileged.read_template(text)


def test_a_field_of_another_kind_is_named():
    with pytest.raises(InputError, match=re.escape("f.jsonl, line 3: field 'x' is [1], expected a text or a number")):
        privileged.read_template("{x}").fill({"x": [1]}, "f.jsonl, line 3")


def test_where_the_text_stands():
    system, user, reply = ({"role": r, "content": r[0]} for r in ("system", "user", "assistant"))
    assert privileged.with_text([user], "!", "system", "here") == [{"role": "system", "content": "!"}, user]
    assert privileged.with_text([system, user], "!", "system", "here") == [{"role": "system", "content": "s!"}, user]
    assert privileged.with_text([user, reply, user, reply], "!", "user", "here") == [
        user,
        reply,
        {"role": "user", "content": "u!"},
        reply,
    ]
    assert user["content"] == "u"  # the student's message is another one
    with pytest.raises(InputError, match="here: no message is of the role user"):
        privileged.with_text([system], "!", "user", "here")


def test_the_students_prompt_stays_and_the_teachers_goes_through_the_same_template(rows):
    source = rows({"answer": "1"}, {"answer": 2})
    plain = read(source, tiny_config())[1]
    prompts, texts = taught(source, with_prompt())
    assert [p.token_ids for p in prompts] == [p.token_ids for p in plain]
    for i, text in enumerate(texts):
        message = [{"role": "user", "content": f"1+{i} mod10?answer {i + 1}"}]
        assert text == task.tokenizer().apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    _, texts = taught(source, with_prompt(role="system", template="{answer}"))
    assert texts[0].startswith("<|im_start|>system\n1<|im_end|>\n<|im_start|>user\n1+0 mod10?<|im_end|>")


def test_rows_without_the_field(rows, capsys):
    source = rows({"answer": "1", "hint": "5"}, {"answer": "2"}, {"answer": "3", "hint": ""})
    with pytest.raises(
        InputError, match=r"names the field 'hint': .*rows.jsonl, line 2 lacks it.*\['answer', 'problem'\]"
    ):
        taught(source, with_prompt(template="{hint}"))
    prompts, _ = taught(source, with_prompt(template="{hint}", missing="drop"))
    assert [p.privileged_ids is not None for p in prompts] == [True]
    assert "2 of 3 rows lack a field of data.teacher_prompt; they are dropped" in capsys.readouterr().err
    prompts, _ = taught(source, with_prompt(template="{hint}", missing="plain"))
    assert [p.privileged_ids is not None for p in prompts] == [True, False, False]
    told = capsys.readouterr().err
    assert "2 of 3 rows lack a field of data.teacher_prompt; the teacher reads the student's prompt there" in told
    assert "warning: " in told and "student and teacher read the same prompt in 2 of 3 rows" in told


def test_a_field_that_no_row_has_is_refused_also_where_rows_may_lack_it(rows):
    source = rows({"answer": "1"}, {"answer": "2"})
    for missing in ("drop", "plain"):
        with pytest.raises(InputError, match=r"the field 'solution': no row of .*rows.jsonl has it"):
            taught(source, with_prompt(template="{solution}", missing=missing))


def test_a_prompt_of_the_teacher_is_never_cut(rows, capsys):
    source = rows({"answer": "1"}, {"answer": "2222222"}, {"answer": "3"})
    short = with_prompt(max_tokens=16)
    prompts, _ = taught(source, short)
    assert [p.answer for p in prompts] == ["1", "3"]
    assert "1 of 3 teacher prompts are longer than 16 tokens; they are dropped" in capsys.readouterr().err
    teacher = random_lm(2, name="teacher", max_position_embeddings=56)  # with 40 tokens of the response
    prompts, _ = taught(source, with_prompt(), teacher)
    assert [p.answer for p in prompts] == ["1", "3"]
    with pytest.raises(InputError, match="0 prompts are left"):
        taught(source, with_prompt(max_tokens=3))


def test_a_privileged_prompt_that_is_the_students_is_refused_as_a_loss_of_0(rows):
    lm, prompts = read(rows({"answer": "1"}), with_prompt())
    lm.tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    config = with_prompt(role="system", template="hmm ")
    same = [replace(p, token_ids=tuple(lm.tokenizer.encode("1+0 mod10?"))) for p in prompts]
    with pytest.raises(InputError, match="in none of them the teacher reads another one"):
        privileged.for_training(same, config, config.data, lm, lm)


def test_of_a_benchmark_no_row_is_left_out(rows, capsys):
    source = rows({"answer": "1", "hint": "5"}, {"answer": "2"}, {"answer": "3", "hint": "5555555"})
    config = with_prompt(template="{hint}", missing="drop", max_tokens=17)
    lm, prompts = read(source, config)
    loaded = LoadedBenchmark("b", Benchmark(file=source, **BENCHMARK), prompts)
    found = privileged.for_benchmark(loaded, config, lm, lm)
    assert [p.privileged_ids is not None for p in found.prompts] == [True, False, False]
    assert [p.token_ids for p in found.prompts] == [p.token_ids for p in prompts]
    seen = privileged.as_the_teacher_reads(found).prompts
    assert [p.token_ids for p in seen] == [p.teacher_ids for p in found.prompts]
    assert not any(p.privileged_ids for p in seen)
    told = capsys.readouterr().err
    assert "benchmark b: 1 of 3 rows lack a field" in told
    assert "benchmark b: 1 of 3 teacher prompts are longer than 17 tokens" in told
    with pytest.raises(InputError, match="line 2 lacks it"):
        privileged.for_benchmark(loaded, with_prompt(template="{hint}"), lm, lm)


@pytest.mark.parametrize(
    "settings,message",
    [
        (["teacher.path=x"], "teacher.path is 'x' and teacher.mode is \"self\": the teacher is the student"),
        (["teacher.revision=x"], "teacher.revision is 'x'"),
        (["teacher.weights=null"], 'teacher.weights is null and teacher.mode is "self"'),
        (["teacher.weights=ema"], 'teacher.weights is "ema" and teacher.decay is null'),
        (["teacher.decay=0.9"], 'teacher.weights is "initial" and teacher.decay is 0.9'),
        (["teacher.weights=ema", "teacher.decay=1"], "less than 1"),
        (["data.teacher_prompt=null"], "data.teacher_prompt is null: .* so the loss would be 0"),
        (["teacher.weights=live", "data.teacher_prompt=null"], "the loss would be 0"),
        (["teacher.weights=live", "teacher.dtype=bfloat16"], "teacher.dtype is 'bfloat16' and student.dtype is"),
        (
            ["teacher.weights=live", "engine.kind=deepspeed", "engine.deepspeed=zero2", "teacher.placement=host"],
            "where",
        ),
        (["teacher.mode=local"], 'teacher.path is null and teacher.mode is "local"'),
        (
            ["teacher.mode=local", "teacher.path=x"],
            'teacher.weights is "initial", and it belongs to teacher.mode "self"',
        ),
        (["data.teacher_prompt.role=tool"], "'user' or 'system'"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(InputError, match=message):
        with_prompt(*settings)


def test_a_template_that_names_an_unknown_field_ends_a_run_before_it_writes(tiny_pair, tmp_path):
    section = json.dumps(SECTION | {"template": "{solution}"})
    with pytest.raises(InputError, match=r"field 'solution': .*train.jsonl, line 1 lacks it"):
        runs.train(tmp_path, *SELF, f"data.teacher_prompt={section}")
    assert not list((tmp_path / "run").glob("[!.]*"))


def test_a_dry_run_shows_a_prompt_of_the_student_beside_that_of_the_teacher(tiny_pair, tmp_path, capsys):
    dry_run(with_prompt(f"output_dir={tmp_path}"), {}, UniformWeighter(), "auto")
    told = capsys.readouterr().out
    assert "self initial teacher" in told
    student, teacher = (json.loads(re.search(rf"the {who} reads (.*)", told)[1]) for who in ("student", "teacher"))
    begin = student.removesuffix("<|im_end|>\n<|im_start|>assistant\n")
    assert begin != student and teacher.startswith(f"{begin}answer ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("weights", ["initial", "live"])
def test_the_doctor_scores_the_student_against_itself_and_against_its_teacher(tiny_pair, tmp_path, capsys, weights):
    settings = (f"output_dir={tmp_path}", f"teacher.weights={weights}")
    assert examine(with_prompt(*settings)) == []
    told = capsys.readouterr().out
    assert "ok    teacher prompts: prompt train-" in told and "the teacher reads" in told
    itself, other = re.search(r"KL\(student \|\| student\) is at most (\S+) nats, .* (\S+) nats on", told).groups()
    assert float(itself) < 1e-4 < 0.01 < float(other)
