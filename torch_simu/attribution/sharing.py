"""Sharing: several processes attribute a part of the samples each, and add up what they found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from torch_simu._checks import problem
from torch_simu.attribution.methods.sums import LayerSum
from torch_simu.attribution.sequences import ScoredSequence


def share_of(sequences: Sequence[ScoredSequence], fingerprint: str, group: dist.ProcessGroup) -> list[ScoredSequence]:
    """Return every n-th sequence, where n processes share them.

    Args:
        sequences: All sequences, the same in each process.
        fingerprint: A hash of the sequences and of how they are attributed.
        group: The processes.

    Raises:
        ValueError: If the fingerprints differ.
        TypeError: If `group` is no process group.
    """
    if not isinstance(group, dist.ProcessGroup):
        advice = "Pass torch.distributed.group.WORLD after init_process_group."
        raise TypeError(problem(f"group is a {type(group).__name__}", "a ProcessGroup", advice))
    found: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(found, fingerprint, group=group)
    if len(set(found)) > 1:
        wrong = f"{len(set(found))} of {len(found)} processes attribute something else"
        raise ValueError(problem(wrong, "the same model, batches and options in all", "Pass all batches everywhere."))
    return list(sequences[dist.get_rank(group) :: dist.get_world_size(group)])


def added_up(sums: Mapping[str, LayerSum], group: dist.ProcessGroup) -> dict[str, LayerSum]:
    """Return the sums over all processes, layer by layer."""
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    numbers = torch.tensor([each.numbers for each in sums.values()], dtype=torch.float64)
    tensors = [each for found in sums.values() for each in found.tensors]
    flat = torch.cat([*tensors, numbers.flatten()]).to(device)
    dist.all_reduce(flat, group=group)
    *added, numbers = flat.cpu().split([*(each.numel() for each in tensors), numbers.numel()])
    left = iter(added)
    return {
        layer: LayerSum.of([next(left) for _ in found.tensors], *row)
        for (layer, found), row in zip(sums.items(), numbers.reshape(len(sums), -1).tolist(), strict=True)
    }
