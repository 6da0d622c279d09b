"""What goes into TRL's GRPOTrainer: prompts, rewards, settings. TRL itself is in another environment."""

import json
from pathlib import Path

import pytest
from runs import words
from transformers import AutoTokenizer

from data import grpo_teacher
from data.commands import COMMANDS
from opd.config import load_config
from opd.data import read_training_prompts
from opd.errors import InputError
from opd.grading import Verdict

STUDENT = "data/tiny/pairs/chain/student"
MANY = "rollout.n=8"


def configured(*overrides):
    return load_config("configs/tiny.json", [MANY, *overrides])[0]


def options(*arguments):
    parsed = COMMANDS["grpo_teacher"].parser().parse_args([*words(MANY), *arguments])
    parsed.out = parsed.out or Path("out")
    return parsed


@pytest.mark.parametrize("system", ["null", "mod10"])
def test_trl_makes_the_same_prompts_of_the_messages(system, tmp_path):
    """By the same call of the chat template, without the prompts that are too long."""
    problems = [{"problem": "7+5" + "*3" * count, "answer": str(count)} for count in (0, 40, 2)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    config = configured(f"data.system_prompt={system}", f'data.train=["{tmp_path}/train.jsonl"]')
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    rows = grpo_teacher.training_rows(config, tokenizer)
    made = tokenizer.apply_chat_template(
        conversation=[row["prompt"] for row in rows],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **config.data.chat_template_args,
    )["input_ids"]
    expected, _ = read_training_prompts(config.data, tokenizer, 0)
    assert [tuple(ids) for ids in made] == [prompt.token_ids for prompt in expected]
    assert [row["answer"] for row in rows] == [prompt.answer for prompt in expected] == ["0", "2"]


def test_the_reward_is_the_verdict():
    class Grades:
        def grade(self, pairs, answer_lines):
            assert answer_lines and [answer for _, answer in pairs] == ["1", "2", "3"]
            assert not any("<" in text for text, _ in pairs)  # without the token that ends a response
            return [Verdict("1", True), Verdict("x", None), Verdict("4", False)]

    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    end = tokenizer.eos_token_id
    reward = grpo_teacher.Right(Grades(), tokenizer, True)
    ids = [[5, 6, end], [7, end], [8, 9]]
    assert reward(prompts=[], completions=[], completion_ids=ids, answer=["1", "2", "3"], trainer_state=None) == [
        1,
        0,
        0,
    ]


def test_the_settings_are_those_of_the_recipe():
    found = grpo_teacher.settings(configured("rollout.prompts_per_step=4"), options("--micro-batch", "4"), 2)
    recipe = {"epsilon": 0.2, "epsilon_high": 0.28, "loss_type": "dapo", "beta": 0.0, "learning_rate": 1e-6}
    assert {key: found[key] for key in recipe} == recipe
    # 32 responses of an update, 4 at once on each of 2 processes
    assert (found["num_generations"], found["gradient_accumulation_steps"]) == (8, 4)
    assert (
        found["num_train_epochs"] == 1 and "max_steps" not in found and found["model_init_kwargs"]["dtype"] == "float32"
    )
    assert grpo_teacher.settings(configured(), options("--steps", "7"), 1)["max_steps"] == 7


@pytest.mark.parametrize(
    "overrides,arguments,message",
    [
        (["rollout.n=1"], [], "compares at least two different responses"),
        (["rollout.n=3", "rollout.prompts_per_step=1"], [], "an update has 3 responses"),
    ],
)
def test_what_does_not_fit_together_is_refused(overrides, arguments, message):
    with pytest.raises(InputError, match=message):
        grpo_teacher.settings(configured(*overrides), options(*arguments), 1)


@pytest.mark.parametrize("rate", ["0", "-1e-6", "nan", "inf", "x"])
def test_what_is_no_learning_rate_is_refused(rate):
    with pytest.raises(InputError, match="expected a learning rate between 0 and 1"):
        options(f"--lr={rate}")


@pytest.mark.parametrize("override", ["data.answer_field=null", "data.validation=5"])
def test_data_that_cannot_be_rewarded_is_refused(override):
    with pytest.raises(InputError, match="GRPO needs reference answers, and trains on all problems"):
        grpo_teacher.training_rows(configured(override), AutoTokenizer.from_pretrained(STUDENT))
