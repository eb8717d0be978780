"""A counter-based random number generator: what it draws depends on keys only, never on what was drawn before.

A token's key and the number of a word are mixed by the finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable
Pseudorandom Number Generators, OOPSLA 2014). Each word of 64 bits decides four elements, so a mask costs less than
the noise that torch draws for a dropout on the CPU.
"""

from __future__ import annotations

import hashlib

import torch

LEVELS = 1 << 16
"""A probability is rounded to a multiple of 1 / LEVELS: 16 bits decide an element."""
_LANES = 4
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def key_of(*parts: int | str) -> int:
    """Returns a number of 64 bits, signed, that depends on all parts and their order."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def token_keys(key: int, sequences: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Returns a key (n,) for every token, given its sequence and its position in it, whole numbers (n,)."""
    return _mix(_mix(sequences * _GOLDEN + key) + positions * _GOLDEN)


def drawn_below(level: int, keys: torch.Tensor, call: int, width: int) -> torch.Tensor:
    """Draws a mask (n, width), each element true with probability level / LEVELS; keys (n,) of `token_keys`.

    call: a key of the call, which tells it from others on the same tokens. level: in 0..LEVELS - 1.
    """
    words = torch.arange(-(-width // _LANES), device=keys.device) * _GOLDEN
    lanes = _mix(_mix(keys ^ call)[:, None] + words).view(torch.int16)
    return (lanes < level - LEVELS // 2)[:, :width]


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Mixes the bits of every number (int64) in place. A signed shift costs one of 64 bits; the last may not."""
    x.bitwise_xor_(x >> 30).mul_(_FIRST)
    x.bitwise_xor_(x >> 27).mul_(_SECOND)
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))
