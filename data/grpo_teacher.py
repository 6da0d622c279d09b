"""A teacher by GRPO: TRL's GRPOTrainer on the problems of a pair file, with the verdict of opd.grading as its reward.

    bash scripts/train_teacher_grpo.sh configs/PAIR.json [--model PATH] [--out DIR] [--steps N]

The paper's Qwen3-8B teacher went through GRPO and is not published. This is a recipe for one: clipping from 0.2 below
to 0.28 above, a mean over tokens, no KL term, learning rate 1e-6. The trainer is TRL's. What is ours is what goes into
it: the problems, the chat template's prompts, and the reward. It runs in an environment of its own
(requirements-trl.txt).
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data.commands import COMMANDS
from opd.benchmarks import read_benchmarks, takes_answer_lines
from opd.cli import main, say
from opd.config import Config, load_config
from opd.data import make_prompts, read_problems
from opd.errors import InputError
from opd.files import lock
from opd.grading import Grader
from opd.models import set_chat_template


def training_rows(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The problems of data.train as {prompt, answer}. A prompt is messages, of which TRL makes the same tokens as opd.

    Raises InputError for data that cannot be rewarded.
    """
    data = config.data
    if data.answer_field is None or data.validation:
        raise InputError(
            f"data.answer_field is {data.answer_field!r} and data.validation is {data.validation}: GRPO needs "
            "reference answers, and trains on all problems. Name the field, and set data.validation=0."
        )
    system = [] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
    rows = []
    for source in data.train:
        problems = read_problems(source, data.prompt_field, data.answer_field)
        short = {prompt.id for prompt in make_prompts(problems, tokenizer, data, source)}
        rows += [
            {"prompt": [*system, *map(dict, problem.messages)], "answer": problem.answer}
            for problem in problems
            if problem.id in short
        ]
    return rows


class Right:
    """The reward of TRL: 1 for a right response, 0 for any other."""

    __name__ = "right"  # TRL's name of the metric

    def __init__(self, grader: Grader, tokenizer: PreTrainedTokenizerBase, answer_lines: bool):
        self.grader, self.tokenizer, self.answer_lines = grader, tokenizer, answer_lines

    def __call__(self, completion_ids: Sequence[Sequence[int]], answer: Sequence[str], **_: Any) -> list[float]:
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in completion_ids]
        verdicts = self.grader.grade(list(zip(texts, answer, strict=True)), self.answer_lines)
        return [float(verdict.correct is True) for verdict in verdicts]


def settings(config: Config, options: argparse.Namespace, processes: int) -> dict[str, Any]:
    """The arguments of trl.GRPOConfig. Raises InputError for numbers that do not fit together."""
    rollout, responses = config.rollout, config.rollout.prompts_per_step * config.rollout.n
    together = options.micro_batch * processes
    if rollout.n < 2 or rollout.temperature == 0 or responses % together:
        raise InputError(
            f"rollout.n is {rollout.n}, rollout.temperature {rollout.temperature}, and an update has {responses} "
            f"responses: GRPO compares at least two different responses to a prompt, and expects whole passes of "
            f"--micro-batch {options.micro_batch} on {processes} processes. For example --set rollout.n=16."
        )
    length = {"max_steps": options.steps} if options.steps else {"num_train_epochs": 1}
    vllm = {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": rollout.gpu_memory} if options.vllm else {}
    return {
        "output_dir": str(options.out / "trainer"),
        "loss_type": "dapo",  # the mean over all tokens of the update
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "beta": 0.0,
        "learning_rate": options.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": config.optim.weight_decay,
        "max_grad_norm": config.optim.grad_clip,
        "num_generations": rollout.n,
        "per_device_train_batch_size": options.micro_batch,
        "gradient_accumulation_steps": responses // together,
        "temperature": rollout.temperature,
        "top_p": rollout.top_p,
        "max_completion_length": rollout.max_response_tokens,
        "chat_template_kwargs": config.data.chat_template_args,
        "model_init_kwargs": {"dtype": "float32", "revision": revision_of(config, options.model)},
        "bf16": config.teacher.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": config.engine.gradient_checkpointing,
        "use_vllm": options.vllm,
        "deepspeed": options.deepspeed and str(options.deepspeed),
        "seed": config.seed,
        "report_to": "none",
        "save_steps": 50,
        "save_total_limit": 1,
        **vllm,
        **length,
    }


def revision_of(config: Config, model: str | None) -> str | None:
    """The revision of the model to start from, which is the pair file's teacher unless another one is named."""
    return config.teacher_model.revision if model is None else None


def train(config: Config, options: argparse.Namespace) -> None:
    """Trains, or continues, and leaves a Hugging Face folder at options.out."""
    from datasets import Dataset  # both are imported here, because trl is in no other environment than .venv-trl
    from trl import GRPOConfig, GRPOTrainer

    model = options.model or config.teacher_model.path
    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision_of(config, options.model), padding_side="left")
    set_chat_template(tokenizer, config.student, f"model {model!r}")
    arguments = settings(config, options, int(os.environ.get("WORLD_SIZE", "1")))
    rows = training_rows(config, tokenizer)
    say(f"{model}: GRPO on {len(rows)} problems, {arguments['num_generations']} responses each; folder {options.out}")
    answer_lines = takes_answer_lines(config, read_benchmarks(config).values())
    with Grader() as grader:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=Right(grader, tokenizer, answer_lines),
            args=GRPOConfig(**arguments),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=any((options.out / "trainer").glob("checkpoint-*")))
    trainer.save_model(str(options.out / "model"))
    if trainer.is_world_process_zero():
        (options.out / "model" / "training_args.bin").unlink(missing_ok=True)  # a pickle, which nobody should load
        shutil.rmtree(options.out / "trainer", ignore_errors=True)


def command(arguments: list[str]) -> None:
    options = COMMANDS["grpo_teacher"].parser().parse_args(arguments)
    config, _ = load_config(options.config, options.overrides, ignore_extensions=True)
    options.out = options.out or Path(config.output_dir) / f"{config.run_name}-grpo-teacher"
    is_first = os.environ.get("RANK", "0") == "0"
    with lock(options.out, "--out") if is_first else nullcontext():
        if (options.out / "model").exists() and not (options.out / "trainer").exists():
            say(f"{options.out / 'model'}: this teacher is complete")
        else:
            train(config, options)
    if is_first:
        print(options.out / "model")


if __name__ == "__main__":
    main(command)
