"""Seeds. A random draw depends on the run's seed and its own name alone, so a resumed run restores no generator."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a run's seed and the name of a draw, for example (seed, "rollout", step, sequence_id)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A generator on the CPU, seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
