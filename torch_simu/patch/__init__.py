"""Patch: the change of a model as a file that can be checked, applied and taken back."""

from torch_simu.patch.audit import Audit
from torch_simu.patch.checkpoint import (
    apply_to_checkpoint,
    patch_between_checkpoints,
    revert_checkpoint,
    verify_checkpoint,
)
from torch_simu.patch.patch import NeuronPatch

__all__ = [
    "Audit",
    "NeuronPatch",
    "apply_to_checkpoint",
    "patch_between_checkpoints",
    "revert_checkpoint",
    "verify_checkpoint",
]
