"""All randomness is a function of the run's seed and of what is drawn, so a resumed run needs no saved generator."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the seed of a run and the name of a draw, as in (seed, "rollout", step, sequence_id)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*parts))
