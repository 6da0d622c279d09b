"""Checks of scripts/check_gpu.sh: the memory that the loss and a whole update take, against what opd.plan says.

Memory is told and judged on a GPU alone; a process's resident size says little about buffers of toy size. The answer
of a check is as in checks_numbers.py.
"""

import gc
from typing import Any

import torch
from checks_numbers import random_rollouts, toy_pair
from random_models import QWEN3_06B, QWEN3_17B, TOY_STUDENT, TOY_TEACHER, random_model, word_tokenizer
from resident import resident
from updates import Updates, as_a_run, config_of, language_model, weighter_of

from opd.config import Config
from opd.loss import Head, divergence_sum
from opd.models import LanguageModel
from opd.plan import Plan, make_plan, size_of
from opd.progress import Watch, peak_memory_gb, reset_peak_memory

SLACK = 64 * 2**20  # for the matrix library's own workspace, which torch allocates too
BFLOAT16 = ("student.dtype=bfloat16", "teacher.dtype=bfloat16")


def shapes(toy: bool) -> tuple:
    """Shapes of student and teacher; the real ones are those of Qwen3-0.6B and Qwen3-1.7B."""
    return (TOY_STUDENT, TOY_TEACHER) if toy else (QWEN3_06B, QWEN3_17B)


def large_pair(device: torch.device, toy: bool) -> tuple[LanguageModel, LanguageModel]:
    """A random pair that computes in bfloat16, as a run on a GPU does: the student's parameters are float32."""
    student_shape, teacher_shape = shapes(toy)
    student = random_model(student_shape, 0, device)
    teacher = random_model(teacher_shape, 1, device, torch.bfloat16).requires_grad_(False)
    tokenizer = word_tokenizer(student_shape.vocab)
    return tuple(
        language_model(model, tokenizer, name, torch.bfloat16)
        for name, model in (("student", student), ("teacher", teacher))
    )


def plan_for(toy: bool, config: Config, device: torch.device) -> Plan:
    """The plan for such a pair, from models on the meta device: two phases empty the parameters of others."""
    student, teacher = (size_of(random_model(shape, 0, "meta")) for shape in shapes(toy))
    return make_plan(config, student, teacher, device, updates=1)


def held(device: torch.device) -> int:
    """Bytes that are there at present."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident()


def against_plan(device: torch.device, where: str, peak: int, planned: int) -> dict[str, dict[str, Any]]:
    """What a check answers about a peak in bytes; the plan promises that there is no more."""
    if device.type == "cpu":
        return {"figures": {}, "judged": {}}
    figures = {f"GiB of {where}": peak / 2**30, f"planned GiB of {where}": planned / 2**30}
    return {"figures": figures, "judged": {f"peak over plan of {where}": ((peak - SLACK) / planned, 1.0)}}


def joined(answers: list[dict[str, dict[str, Any]]], **figures: Any) -> dict[str, dict[str, Any]]:
    """One answer of several, and more figures."""
    parts = {kind: {name: value for a in answers for name, value in a[kind].items()} for kind in ("figures", "judged")}
    return {"figures": parts["figures"] | figures, "judged": parts["judged"]}


# --- the loss alone ---------------------------------------------------------------------------------------------------
def loss_memory(device: torch.device, toy: bool) -> dict[str, Any]:
    """Peak of the loss beyond its inputs, for more and more tokens."""
    answers = []
    (student, teacher), g = shapes(toy), torch.Generator(device).manual_seed(0)
    head = torch.randn(student.vocab, student.hidden, generator=g, device=device).requires_grad_()
    teacher_head = torch.randn(teacher.vocab, teacher.hidden, generator=g, device=device).bfloat16()
    for tokens in (64, 256) if toy else (1024, 4096, 16_384):
        hidden = torch.randn(tokens, student.hidden, generator=g, device=device).bfloat16().requires_grad_()
        teacher_hidden = torch.randn(tokens, teacher.hidden, generator=g, device=device).bfloat16()
        planned = _planned_loss(device, toy, tokens)
        before = held(device)
        reset_peak_memory(device)
        total = divergence_sum(
            hidden, Head(head), teacher_hidden, Head(teacher_head), torch.ones(tokens, device=device)
        )
        total.backward()
        peak = round(peak_memory_gb(device) * 2**30) - before
        peak -= 6 * hidden.numel()  # the states' gradient, in float32 and bfloat16, is an activation in the plan
        answers.append(against_plan(device, f"the loss at {tokens} tokens", peak, planned))
        head.grad = hidden.grad = None
    return joined(answers)


def _planned_loss(device: torch.device, toy: bool, tokens: int) -> int:
    """Bytes of the loss in a plan whose micro-batch has so many tokens."""
    config = config_of(*BFLOAT16, f"optim.micro_batch_tokens={tokens}", f"rollout.max_response_tokens={tokens}")
    return plan_for(toy, config, device).phases["update"]["loss"]


# --- a whole update ---------------------------------------------------------------------------------------------------
class Peaks:
    """The peak of every phase of an update, in bytes."""

    def __init__(self, device: torch.device):
        self.device, self.phase = device, ""
        self.bytes: dict[str, int] = {}

    def watch(self, updates: Updates) -> None:
        updates.entered, updates.left = self.entered, self.left

    def entered(self, phase: str) -> None:
        self.phase = phase
        reset_peak_memory(self.device)

    def left(self) -> None:
        """The phase at hand has ended. What the next one moves does not count as its own."""
        if self.phase:
            peak = round(peak_memory_gb(self.device) * 2**30)
            self.bytes[self.phase] = max(peak, self.bytes.get(self.phase, 0))


def update_memory(device: torch.device, toy: bool) -> dict[str, Any]:
    """Peak of teacher and update for long responses in one micro-batch, against the plan."""
    answers, pair = [], large_pair(device, toy)
    for tokens in (128,) if toy else (4096, 16_384):
        prompt, rollouts = 8, 4
        config = config_of(
            *BFLOAT16,
            "engine.gradient_checkpointing=true",
            f"data.max_prompt_tokens={prompt}",
            f"rollout.max_response_tokens={tokens // rollouts - prompt}",
            f"rollout.prompts_per_step={rollouts}",
            f"optim.micro_batch_tokens={tokens}",
        )
        peaks, planned = Peaks(device), plan_for(toy, config, device).peaks
        updates = Updates(*pair, [], 0, config, weighter_of("plain"))
        peaks.watch(updates)
        lengths = [(prompt, config.rollout.max_response_tokens)] * rollouts
        responses = random_rollouts(lengths, shapes(toy)[0].vocab)
        for _ in range(2):  # the first one makes the optimizer's moments
            updates.learn(responses, Watch(device, updates.enter))
        peaks.left()
        answers += [
            against_plan(device, f"{phase} at {tokens} tokens", peak, planned[phase])
            for phase, peak in peaks.bytes.items()
        ]
        del updates
        gc.collect()  # the optimizer and its schedule refer to one another
    return joined(answers)


def two_phases(device: torch.device, toy: bool) -> dict[str, Any]:
    """Updates whose models take turns on the device, against updates whose models stay: equal bit for bit."""
    as_a_run()
    results, unpinned, left = [], 0, []
    for number in (1, 2):
        student, teacher = toy_pair(device)
        for lm in (student, teacher):  # the other kernels of attention add in any order
            lm.model.set_attn_implementation("eager")
        config = config_of(f"engine.phases={number}")
        updates = Updates(student, teacher, [(2, 3, 4), (5, 6)], 12, config, weighter_of("soft_or"))
        if number == 2:
            updates.entered = lambda phase, student=student: left.append(
                sum(p.numel() for p in student.model.parameters()) if phase == "teacher" else 0
            )
        for _ in range(3):
            updates.one()
        results.append([updates.phases.content(p).to(device) for p in student.model.parameters()])
        if number == 2 and device.type == "cuda":
            unpinned = sum(not buffer.is_pinned() for buffer in updates.phases.host.values())
    different = sum(not torch.equal(a, b) for a, b in zip(*results, strict=True))
    judged = {
        "different parameters": (different, 0),
        "buffers that are not pinned": (unpinned, 0),
        "the student's numbers on the device while the teacher scores": (max(left), 0),
    }
    return {"figures": {"parameters": len(results[0])}, "judged": judged}
