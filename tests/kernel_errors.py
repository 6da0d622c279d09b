"""Errors of the loss's Triton kernels, as JSON: python tests/kernel_errors.py, with TRITON_INTERPRET=1 on a CPU."""

import json
import sys

import torch

CASES = {  # vocabulary, size of the logits, difference of the models
    "several blocks": (9000, 3.0, 1.0),
    "less than a block": (300, 20.0, 3.0),
    "nearly equal models": (5000, 5.0, 0.1),
    "a confident student": (5000, 40.0, 40.0),
}


def errors_of(case):
    """Relative errors of sums and gradients against float64, for logits of student and teacher that differ by 7."""
    from opd import kernels

    vocabulary, size, gap = CASES[case]
    torch.manual_seed(0)
    student = torch.randn(6, vocabulary) * size
    teacher = student + gap * torch.randn(6, vocabulary) + 7
    share = torch.linspace(0, 1, 6)
    s, t = student.double().requires_grad_(), teacher.double()
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    expected = {
        "log_z_student": s.logsumexp(-1),
        "log_z_teacher": t.logsumexp(-1),
        "student_entropy": torch.special.entr(log_p.exp()).sum(-1),
        "teacher_entropy": torch.special.entr(log_q.exp()).sum(-1),
        "reverse_kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "forward_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
    }
    sums = kernels.row_sums(student, teacher)
    errors = {name: ((getattr(sums, name) - value).norm() / value.norm()).item() for name, value in expected.items()}
    for f in None, share:
        loss = expected["reverse_kl"] if f is None else (1 - f) * expected["reverse_kl"] + f * expected["forward_kl"]
        (gradient,) = torch.autograd.grad(loss.sum(), s, retain_graph=True)
        for dtype in torch.float32, torch.bfloat16:
            out = torch.full((6, 2 * vocabulary), torch.nan, dtype=dtype)[:, :vocabulary]
            kernels.write_gradient(student, teacher, sums, f, out)
            name = f"gradient, {'reverse KL' if f is None else 'mixed'}, {dtype}"
            errors[name] = ((out - gradient).norm() / gradient.norm()).item()
    return errors


def differences():
    """Relative differences of loss, gradients and statistics with kernels and without, on a head with a soft cap."""
    from opd import loss

    torch.manual_seed(0)
    states, head = torch.randn(11, 8).requires_grad_(), torch.randn(300, 8).requires_grad_()
    models = (loss.Head(head, scale=0.7, soft_cap=5.0, vocab_size=290), torch.randn(11, 12))
    models = (states, *models, loss.Head(torch.randn(300, 12), vocab_size=290))
    weights = torch.tensor([0.0, 1.0, 0.5] * 3 + [2.0, 1.0])
    needs = frozenset({"student_entropy", "reverse_kl", "forward_kl", "student_logprob", "teacher_logprob"})
    found = []
    for fused in True, False:
        loss.has_kernels = lambda kind, fused=fused: fused
        columns = {}
        for name in "reverse_kl", "forward_kl":
            total = loss.divergence_sum(*models, weights, weights / 2, loss.Objective(name), chunk_bytes=2**14)
            columns |= {
                f"loss, {name}": total,
                f"{name}, states": torch.autograd.grad(total, states, retain_graph=True)[0],
            }
        total = loss.divergence_sum(*models, weights, chunk_bytes=2**14)
        columns["head"] = torch.autograd.grad(total, head)[0]
        columns |= loss.token_stats(*models, torch.arange(11), needs | {"top1_agree"}, chunk_bytes=2**14)
        found.append({name: column.detach().double() for name, column in columns.items()})
    return {name: ((found[0][name] - b).norm() / b.norm().clamp(min=1e-9)).item() for name, b in found[1].items()}


if __name__ == "__main__":
    json.dump({case: errors_of(case) for case in CASES} | {"differences": differences()}, sys.stdout)
