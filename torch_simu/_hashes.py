"""Hashes of tensors, bit by bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, in the order of its indices."""
    whole = tensor.detach().cpu().contiguous()
    # Through bytes, because numpy has no bfloat16.
    return memoryview(whole.reshape(-1).view(torch.uint8).numpy().data)


def sha256_of(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's bytes."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def sha256_of_all(tensors: Iterable[tuple[str, Tensor]], start: str = "") -> str:
    """Return one sha256 over a text and named tensors: their names, dtypes, shapes and bytes."""
    digest = hashlib.sha256(start.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def sha256_of_hashes(hashes: Mapping[str, str]) -> str:
    """Return one sha256 over names and their hashes: that of the lines `hash  name` in the order of the names."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
