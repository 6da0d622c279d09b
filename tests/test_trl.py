"""TRL's trainers with a weighter of ours: the loss is TRL's own without a selection, and the selection is ours.

These tests run where TRL is installed: pip install pytest, then pytest tests/test_trl.py in .venv-bench.
"""

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from helpers import one_each, pair_of, random_lm
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from opd.data import Prompt, Rollout
from opd.errors import InputError
from opd.hooks import UniformWeighter
from opd.step import score_update
from tip.config import TipConfig
from tip.trl import SelectingDistillationTrainer, SelectingGRPOTrainer
from tip.weighter import TipWeighter

COMMON = {
    "max_completion_length": 8,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "gradient_checkpointing": False,
}
PROMPTS = ["1+2", "3+4+5", "6", "7+8", "9+1", "2+2", "5", "4+4+4"]


class Seen:
    """A weighter that keeps what another one was asked and answered."""

    def __init__(self, weighter):
        self.weighter, self.needs, self.calls = weighter, weighter.needs, []

    def __call__(self, stats, generator):
        answer = self.weighter(stats, generator)
        self.calls.append((stats, answer.weights))
        return answer


def tokenizer_of(lm):
    lm.tokenizer.padding_side = "left"
    return lm.tokenizer


def distilled(folder, trainer=DistillationTrainer, **more):
    student, teacher = random_lm(1), random_lm(2, name="teacher")
    config = DistillationConfig(output_dir=str(folder), beta=1.0, **COMMON)
    data = Dataset.from_dict({"prompt": PROMPTS})
    models = {"model": student.model, "teacher_model": teacher.model, "processing_class": tokenizer_of(student)}
    made = trainer(args=config, train_dataset=data, **models, **more)
    made.train()
    return student, teacher, made


def reinforced(folder, trainer=GRPOTrainer, **more):
    student = random_lm(1)
    config = GRPOConfig(output_dir=str(folder), num_generations=4, beta=0.0, **COMMON)
    reward = lambda completions, **_: [float(len(set(text))) for text in completions]  # noqa: E731
    data = Dataset.from_dict({"prompt": PROMPTS})
    models = {"model": student.model, "reward_funcs": reward, "processing_class": tokenizer_of(student)}
    made = trainer(args=config, train_dataset=data, **models, **more)
    made.train()
    return (student,)


def parameters(lm):
    return torch.cat([p.detach().flatten() for p in lm.model.parameters()])


@pytest.mark.parametrize(
    ("train", "ours"), [(distilled, SelectingDistillationTrainer), (reinforced, SelectingGRPOTrainer)]
)
def test_without_a_selection_trl_trains_as_by_itself(train, ours, tmp_path):
    alone, weighed = train(tmp_path)[0], train(tmp_path, ours, weighter=UniformWeighter())[0]
    start = parameters(random_lm(1))
    assert torch.equal(parameters(alone), parameters(weighed)) and not torch.equal(parameters(alone), start)


def test_the_selected_tokens_of_a_distillation_are_ours(tmp_path):
    config = TipConfig(rule="soft_or", retention=0.5)
    masks = []

    class Watched(SelectingDistillationTrainer):
        def _generate_and_score_completions(self, inputs):
            made = super()._generate_and_score_completions(inputs)
            masks.append(made)
            return made

    seen = Seen(TipWeighter(config))
    distilled(tmp_path, Watched, weighter=seen)
    batch, (stats, weights) = masks[0], seen.calls[0]
    student, teacher = random_lm(1), random_lm(2, name="teacher")  # as they were in the first update
    rollouts = []
    for i in range(len(batch["prompt_ids"])):
        prompt, answer = (batch[f"{name}_ids"][i][batch[f"{name}_mask"][i].bool()] for name in ("prompt", "completion"))
        rollouts.append(Rollout(i, Prompt(str(i), tuple(prompt.tolist()), None), tuple(answer.tolist()), "stop"))
    own = score_update(pair_of(student, teacher), one_each(rollouts), TipWeighter(config).needs, 1)
    assert torch.equal(own.sequence_id, stats.sequence_id) and torch.equal(own.token_id, stats.token_id)
    for name in ("student_entropy", "reverse_kl"):
        torch.testing.assert_close(vars(own)[name], vars(stats)[name], rtol=1e-3, atol=1e-4)
    ours = TipWeighter(config)(own, torch.Generator()).weights
    assert torch.equal(ours, weights) and 0 < ours.sum() < len(ours)
    kept = batch["tool_mask"][batch["completion_mask"].bool()]
    assert torch.equal(kept.float(), ours) and batch["num_items_in_batch"] == ours.sum()


def test_the_policy_gradient_is_on_the_tokens_of_highest_entropy(tmp_path):
    seen = Seen(TipWeighter(TipConfig(rule="entropy_topk", retention=0.5)))
    selected = reinforced(tmp_path, SelectingGRPOTrainer, weighter=seen)[0]
    assert not torch.equal(parameters(selected), parameters(reinforced(tmp_path)[0]))
    for stats, weights in seen.calls:
        for i in stats.sequence_id.unique():
            rows = stats.sequence_id == i
            kept, entropy = weights[rows] > 0, stats.student_entropy[rows]
            assert kept.sum() == int(rows.sum()) // 2
            assert not kept.any() or kept.all() or entropy[kept].min() >= entropy[~kept].max()


def test_what_trl_does_not_have_is_refused(tmp_path):
    with pytest.raises(InputError, match="needs 'reverse_kl', and SelectingGRPOTrainer gives the student's entropy"):
        reinforced(tmp_path, SelectingGRPOTrainer, weighter=TipWeighter(TipConfig()))
    with pytest.raises(ValueError, match="share of forward KL"):
        weighter = TipWeighter(TipConfig(mixture="total_variation"))
        distilled(tmp_path, SelectingDistillationTrainer, weighter=weighter)
    with pytest.raises(ValueError, match="expected one"):
        distilled(tmp_path, SelectingDistillationTrainer, weighter=TipWeighter(TipConfig(rule="tropd")))
