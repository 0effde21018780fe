"""Random generators named by what they are for, so that no draw depends on what was drawn before or on the topology."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on all parts and on nothing else (BLAKE2b of their text)."""
    text = "\0".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` that starts from `derived_seed(*parts)`."""
    return torch.Generator(device=device).manual_seed(derived_seed(*parts))
