"""Checks of scripts/check_gpu.sh: whether this machine computes what float64 or the plain way computes.

A check returns `figures`, name -> number or text, and `judged`, name -> (number, the largest that passes).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from random_models import TOY_STUDENT, TOY_TEACHER, NoEnd, random_model, word_tokenizer
from torch import Tensor
from updates import config_of, language_model

from opd import divergence
from opd.batch import make_micro_batches
from opd.data import Prompt, Rollout
from opd.hooks import UniformWeighter
from opd.loss import Head, Objective, divergence_sum, token_stats
from opd.models import LanguageModel
from opd.rollout import Decoding
from opd.rollout.local import TransformersSampler
from opd.step import Pair, train_step
from opd.teacher.local import LocalTeacher

OBJECTIVES = {
    "reverse KL": (Objective("reverse_kl"), False),
    "forward KL": (Objective("forward_kl"), False),
    "JSD 0.5": (Objective("jsd", 0.5), False),
    "JSD 0.1": (Objective("jsd", 0.1), False),
    "reverse and forward KL mixed": (Objective("reverse_kl"), True),
}
GRADIENT_ERROR = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # bfloat16: the gradient of a logit is rounded to it


def relative(a: Tensor, b: Tensor) -> float:
    """L2 norm of a - b over that of b, in float64."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# --- the loss ---------------------------------------------------------------------------------------------------------
@dataclass
class Inputs:
    """Hidden states in a dtype and heads in float32 whose numbers this dtype has, as in training."""

    device: torch.device
    dtype: torch.dtype
    toy: bool
    hidden: list[Tensor] = field(init=False)  # of student and teacher
    heads: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        tokens, vocab, widths = (24, 500, (32, 48)) if self.toy else (96, 151_936, (256, 384))
        g = torch.Generator(self.device).manual_seed(0)

        def normal(rows: int, columns: int, scale: float) -> Tensor:
            numbers = torch.randn(rows, columns, generator=g, device=self.device) * scale
            return numbers.to(self.dtype)

        self.hidden = [normal(tokens, width, 1.0) for width in widths]
        self.heads = [normal(vocab, width, 2 / width**0.5).float() for width in widths]
        self.weights = torch.rand(tokens, generator=g, device=self.device)
        self.weights[::5] = 0
        self.share = torch.rand(tokens, generator=g, device=self.device)
        self.hidden[0].requires_grad_(), self.heads[0].requires_grad_()

    def gradients(self, total: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(total, (self.hidden[0], self.heads[0])))

    def logits(self) -> list[Tensor]:
        return [hidden.double() @ head.double().T for hidden, head in zip(self.hidden, self.heads, strict=True)]


def _reference(inputs: Inputs, objective: Objective, mixed: bool) -> Tensor:
    student, teacher = inputs.logits()
    if objective.divergence == "jsd":
        loss = divergence.jsd(student, teacher, objective.jsd_beta)
    else:
        loss = {"reverse_kl": divergence.reverse_kl, "forward_kl": divergence.forward_kl}[objective.divergence](
            student, teacher
        )
    if mixed:
        share = inputs.share.double()
        loss = (1 - share) * loss + share * divergence.forward_kl(student, teacher)
    return (inputs.weights.double() * loss).sum()


def loss(device: torch.device, toy: bool) -> dict[str, Any]:
    """Value and gradients of every divergence against float64, from float32 and from bfloat16 states."""
    figures, judged = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = Inputs(device, dtype, toy)
        heads = [Head(head) for head in inputs.heads]
        chunk = 2**18 if toy else 2**26  # several chunks
        for name, (objective, mixed) in OBJECTIVES.items():
            share = inputs.share if mixed else None
            states = (inputs.hidden[0], heads[0], inputs.hidden[1], heads[1])
            total = divergence_sum(*states, inputs.weights, share, objective, chunk)
            expected = _reference(inputs, objective, mixed)
            pairs = zip(inputs.gradients(total), inputs.gradients(expected), strict=True)
            where = f"{name}, {str(dtype).removeprefix('torch.')}"
            judged[f"value, {where}"] = (relative(total, expected), 1e-4)
            judged[f"gradient, {where}"] = (max(relative(a, b) for a, b in pairs), GRADIENT_ERROR[dtype])
    return {"figures": figures, "judged": judged}


def statistics(device: torch.device, toy: bool) -> dict[str, Any]:
    """The statistics of tokens against float64, from bfloat16 states."""
    inputs = Inputs(device, torch.bfloat16, toy)
    student, teacher = (logits.detach() for logits in inputs.logits())
    expected = {
        "student_entropy": divergence.entropy(student),
        "teacher_entropy": divergence.entropy(teacher),
        "reverse_kl": divergence.reverse_kl(student, teacher),
        "forward_kl": divergence.forward_kl(student, teacher),
        "jsd": divergence.jsd(student, teacher),
        "total_variation": (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) / 2,
    }
    heads, ids = [Head(head.detach()) for head in inputs.heads], torch.zeros(len(student), dtype=torch.long)
    hidden = [states.detach() for states in inputs.hidden]
    found = token_stats(hidden[0], heads[0], hidden[1], heads[1], ids.to(device), frozenset(expected))
    return {"figures": {}, "judged": {name: (relative(found[name], b), 1e-4) for name, b in expected.items()}}


def products(device: torch.device, toy: bool) -> dict[str, Any]:
    """torch.mm of bfloat16 matrices with float32 output, in the three orders that the loss multiplies in."""
    if device.type == "cpu":
        return {"skipped": "torch.mm has no out_dtype on a CPU, so the loss does not use it there"}
    g = torch.Generator(device).manual_seed(0)
    tokens, width, vocab = (32, 64, 512) if toy else (300, 1024, 20_000)
    hidden = torch.randn(tokens, width, generator=g, device=device).bfloat16()
    head = torch.randn(vocab, width, generator=g, device=device).bfloat16()
    slopes = torch.randn(tokens, vocab, generator=g, device=device).bfloat16()
    cases = {"logits": (hidden, head.T), "of states": (slopes, head), "of head": (slopes.T, hidden)}
    judged = {}
    for name, (a, b) in cases.items():
        product = torch.mm(a, b, out_dtype=torch.float32)
        judged[name] = (relative(product, a.double() @ b.double()), 1e-5)
    return {"figures": {}, "judged": judged}


# --- the step ---------------------------------------------------------------------------------------------------------
def adamw(device: torch.device, toy: bool) -> dict[str, Any]:
    """The fused AdamW against the one that is written out, over twenty steps.

    The parameters begin at 0: near a large number, a step of the learning rate would be rounded away.
    """
    g = torch.Generator(device).manual_seed(0)
    start = torch.zeros(64 if toy else 4096, 64, device=device)
    slopes = [torch.randn(start.shape, generator=g, device=device) for _ in range(20)]
    moved = []
    for settings in ({"fused": True}, {"foreach": False, "fused": False}):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.1, **settings)
        for slope in slopes:
            parameter.grad = slope.clone()
            optimizer.step()
        moved.append(parameter.detach() - start)
    return {"figures": {}, "judged": {"difference of what moved": (relative(*moved), 1e-5)}}


class Recorder:
    """An opd.engine.Engine that keeps the gradient of an update and changes nothing."""

    lockstep = False

    def __init__(self, student: LanguageModel):
        self.student, self.gradient = student, torch.zeros(0)

    def start(self, step: int) -> float:
        self.student.model.zero_grad(set_to_none=True)
        return 0.0

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def finish(self, apply: bool) -> float:
        self.gradient = torch.cat([p.grad.flatten().float() for p in self.student.model.parameters()])
        return self.gradient.norm().item()


def toy_pair(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[LanguageModel, LanguageModel]:
    """A small random student, whose parameters are float32, and a teacher in the dtype of computation."""
    student = random_model(TOY_STUDENT, 0, device)
    teacher = random_model(TOY_TEACHER, 1, device, dtype).requires_grad_(False)
    tokenizer = word_tokenizer(TOY_STUDENT.vocab)
    return language_model(student, tokenizer, "student", dtype), language_model(teacher, tokenizer, "teacher", dtype)


def random_rollouts(lengths: list[tuple[int, int]], vocab: int) -> list[Rollout]:
    """Rollouts with random tokens, of these lengths of prompt and response."""
    g = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, vocab, (count,), generator=g).tolist())

    return [Rollout(i, Prompt(str(i), ids(p), None), ids(r), "length") for i, (p, r) in enumerate(lengths)]


def batching(device: torch.device, toy: bool) -> dict[str, Any]:
    """The gradient of an update whose rollouts share micro-batches and rows, against one rollout in each."""
    lengths = [(3 + i % 5, 1 + (7 * i) % (23 if toy else 150)) for i in range(12 if toy else 48)]
    rollouts, judged = random_rollouts(lengths, TOY_STUDENT.vocab), {}
    for dtype, limit in ((torch.float32, 2e-5), (torch.bfloat16, 5e-2)):
        student, teacher = toy_pair(device, dtype)
        pair = Pair(student, LocalTeacher(teacher), TOY_STUDENT.vocab, config_of().loss)
        found = []
        for tokens, row in ((1, 0), (4096, pair.packed_row)):
            engine, batches = Recorder(student), make_micro_batches(rollouts, tokens, student.eos_ids[0], "keep", row)
            train_step(pair, engine, batches, UniformWeighter(), step=1, seed=0)
            found.append(engine.gradient)
        judged[f"gradient, {str(dtype).removeprefix('torch.')}"] = (relative(found[1], found[0]), limit)
    figures = {"rollouts": len(rollouts), "tokens of a row that is shared, at most": pair.packed_row}
    return {"figures": figures, "judged": judged}


def decoding(device: torch.device, toy: bool) -> dict[str, Any]:
    """Greedy and sampled responses that are generated together, against one at a time, in float32."""
    student, _ = toy_pair(device)
    student.model.register_forward_hook(NoEnd(student.eos_ids[0]), with_kwargs=True)
    prompts = [rollout.prompt for rollout in random_rollouts([(3 + i % 5, 1) for i in range(8)], TOY_STUDENT.vocab)]
    judged = {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        texts = [
            [
                rollout.response_ids
                for rollout in TransformersSampler(student, together).sample(
                    prompts, Decoding(temperature, 1.0, 16), TOY_STUDENT.vocab, [(0, i) for i in range(len(prompts))]
                )
            ]
            for together in (8, 1)
        ]
        different = sum(a != b for a, b in zip(*texts, strict=True))
        judged[f"different responses of {len(prompts)}, {name}"] = (different, 1)  # two ids may be equally likely
    return {"figures": {}, "judged": judged}
