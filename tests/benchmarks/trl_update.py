"""One side of bench_step.py: the same updates by TRL's DistillationTrainer. It runs in an environment that has TRL.

TRL 1.16 trains on the student's own samples only, by transformers' generate, and its beta 1 is the reverse KL. Its
phases are timed from outside: around its generation, around the teacher's body, and what is left of the update.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from random_models import Material, material
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Timed(TrainerCallback):
    """Seconds of each update and of its phases."""

    def __init__(self):
        self.updates: list[dict[str, float]] = []
        self.present: dict[str, float] = {}
        self.begin = self.cpu = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.present = {"rollout": 0.0, "teacher": 0.0, "score": 0.0, "tokens": 0}
        self.begin, self.cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        total, cpu = time.perf_counter() - self.begin, time.process_time() - self.cpu
        update = total - self.present["rollout"] - self.present["teacher"]
        self.updates.append({**self.present, "update": update, "total": total, "cpu": cpu})

    def around(self, name: str, work: Callable, counts: Callable[[tuple], bool] = lambda arguments: True) -> Callable:
        """`work`, whose seconds count as phase `name` where its arguments say so."""

        def timed(*arguments: Any, **more: Any) -> Any:
            begin = time.perf_counter()
            result = work(*arguments, **more)
            if counts(arguments):
                self.present[name] += time.perf_counter() - begin
            if name == "rollout":
                self.present["tokens"] += sum(map(len, result))
            return result

        return timed


def trainer_of(setting: dict[str, Any], made: Material, folder: str) -> DistillationTrainer:
    config = DistillationConfig(
        output_dir=folder,
        beta=1.0,
        temperature=1.0,
        max_completion_length=setting["longest"],
        per_device_train_batch_size=setting["rows"],
        gradient_accumulation_steps=setting["rollouts"] // setting["rows"],
        max_steps=setting["updates"] + 1,
        learning_rate=setting["lr"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=0.9,
        adam_beta2=0.98,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    made.tokenizer.padding_side = "left"
    return DistillationTrainer(
        model=made.student,
        teacher_model=made.teacher,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": made.prompts}),
        processing_class=made.tokenizer,
    )


def updates(setting: dict[str, Any]) -> list[dict[str, float]]:
    """The measured updates of a setting; the first one warms up and is left out."""
    made, timed = material(setting), Timed()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(setting, made, folder)
        trainer.add_callback(timed)
        trainer._generate_single_turn = timed.around("rollout", trainer._generate_single_turn)
        body = trainer._get_last_hidden_state
        trainer._get_last_hidden_state = timed.around("teacher", body, lambda arguments: arguments[0] is made.teacher)
        trainer.train()
    return timed.updates[1:]


def main() -> None:
    from resident import high_water, resident  # after the imports above, which are TRL's own

    torch.set_num_threads(1)
    before, setting = resident(), json.loads(sys.argv[1])
    measured = updates(setting)
    print(json.dumps({"updates": measured, "imported": before, "peak": high_water()}))


if __name__ == "__main__":
    main()
