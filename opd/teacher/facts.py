"""What both ends of the line to a teacher server share, beside opd.wire: what tells one teacher from another."""

import hashlib
import json
from typing import Any

import torch

from opd import models
from opd.config import TeacherSection
from opd.models import LanguageModel

KEY = "OPD_TEACHER_KEY"  # environment variable: the secret that both ends must know
PROTOCOL = 1  # rises with every change of what travels
SAMPLED = 2**16  # how many numbers of a parameter its digest reads: other weights differ in nearly all numbers


def facts_of(lm: LanguageModel, section: TeacherSection) -> dict[str, Any]:
    """What config.json, tokenizer and section say of a teacher. A model without its weights has the same facts."""
    head = lm.model.get_output_embeddings()
    return {
        "architecture": type(lm.model).__name__,
        "parameters": sum(p.ds_numel if lm.sharded else p.numel() for p in lm.model.parameters()),
        "hidden size": head.in_features,
        "rows of the head": head.out_features,
        "vocabulary (digest)": vocabulary_digest(lm),
        "dtype": section.dtype,
        "attn_implementation": section.attn_implementation,
    }


def vocabulary_digest(lm: LanguageModel) -> str:
    """A digest of the string of every id."""
    return hashlib.sha256(json.dumps(models.strings_of(lm.tokenizer)).encode()).hexdigest()[:16]


@torch.no_grad()
def weights_digest(lm: LanguageModel) -> str:
    """A digest of the weights: of the name, shape and dtype of every parameter, and of SAMPLED of its numbers.

    It is the same on every device.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(lm.model.named_parameters()):
        numbers = parameter.detach().flatten()
        sample = numbers[:: max(1, len(numbers) // SAMPLED)].cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
