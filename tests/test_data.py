"""Problems and prompts: order, epochs, chat template, messages."""

import json

import pytest

from data.tiny import task
from opd.config import load_config
from opd.data import Prompt, count_steps, make_prompts, prompts_of_step, read_problems, read_training_prompts
from opd.errors import InputError

PROMPTS = [Prompt(str(i), (i,), None) for i in range(10)]


def ids(step, per_step=4, shuffle=True, seed=0):
    return [int(p.id) for p in prompts_of_step(PROMPTS, step, per_step, shuffle, seed)]


def test_every_epoch_has_every_prompt_once_in_an_order_of_its_own():
    stream = [i for step in range(1, 11) for i in ids(step)]  # four epochs of ten
    epochs = [stream[k : k + 10] for k in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert ids(3) == stream[8:12]  # a step alone is the step in its stream; this one spans two epochs
    assert ids(1, seed=1) != ids(1)


def test_file_order_without_shuffling():
    assert [ids(step, 4, False) for step in (1, 2, 3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


def test_the_length_of_a_run():
    assert count_steps(PROMPTS, 4, None, 7) == 7
    assert count_steps(PROMPTS, 4, 2, None) == 5
    with pytest.raises(InputError, match="10 prompts x 1 epochs are fewer"):
        count_steps(PROMPTS, 11, 1, None)


def test_messages_system_prompt_and_instruction(tmp_path):
    path = tmp_path / "p.jsonl"
    turns = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "3*3"},
    ]
    rows = [
        {"q": "5-4", "a": 1},
        {"id": "mine", "q": turns, "a": "9"},
        {"unique_id": "u/7", "q": "0\u2028+1", "a": "01"},
    ]
    path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n", encoding="utf-8")
    problems = read_problems(path, "q", "a")
    assert [(p.id, p.answer) for p in problems] == [("1", "1"), ("mine", "9"), ("u/7", "01")]
    assert read_problems(path, "q", None)[0].answer is None
    data = load_config("configs/tiny.json", ["data.system_prompt=now ", "data.max_prompt_tokens=60"])[0].data
    tokenizer = task.tokenizer()
    prompts = make_prompts(problems[:2], tokenizer, data, "p", instruction=" mod10?")
    assert [tokenizer.decode(p.token_ids) for p in prompts] == [
        "<|im_start|>system\nnow <|im_end|>\n<|im_start|>user\n5-4 mod10?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nnow <|im_end|>\n<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n3*3 mod10?<|im_end|>\n<|im_start|>assistant\n",
    ]


def test_numbers_are_answers(tmp_path):
    """As they are written without an exponent: a grader reads 1e-07 as a product."""
    numbers = {"1": "1", "-3": "-3", "0.5": "0.5", "42.0": "42", "1e-7": "0.0000001", "1e22": "1" + "0" * 22}
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f'{{"q": "x", "a": {number}}}\n' for number in numbers))
    assert [p.answer for p in read_problems(path, "q", "a")] == list(numbers.values())


def test_a_mixture_of_files_and_held_out_prompts(tmp_path):
    for name, count in (("a", 6), ("b", 4)):
        rows = [{"id": f"{name}{i}", "problem": f"{i}+1 mod10?", "answer": "1"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = json.dumps([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    data = load_config("configs/tiny.json", [f"data.train={files}", "data.validation=3"])[0].data
    train, validation = read_training_prompts(data, task.tokenizer(), seed=0)
    assert len(train) == 7 and len(validation) == 3 and {p.id[0] for p in train} == {"a", "b"}
    places = {int(p.id.removeprefix("validation-")) for p in validation}
    every = [f"{n}{i}" for n, c in (("a", 6), ("b", 4)) for i in range(c)]
    assert [p.id for p in train] == [text for i, text in enumerate(every) if i not in places]
    assert read_training_prompts(data, task.tokenizer(), seed=0) == (train, validation)
    assert read_training_prompts(data, task.tokenizer(), seed=1) != (train, validation)


def test_chat_template_arguments_arrive():
    tokenizer = task.tokenizer()
    tokenizer.chat_template = "{% if enable_thinking %}+{% else %}-{% endif %}{{ messages[0]['content'] }}"
    data = load_config("configs/tiny.json", ['data.chat_template_args={"enable_thinking": false}'])[0].data
    problem = read_problems_from("7")
    assert tokenizer.decode(make_prompts(problem, tokenizer, data, "p")[0].token_ids) == "-7"


def read_problems_from(text):
    from opd.data import Problem

    return [Problem("0", ({"role": "user", "content": text},), None)]
