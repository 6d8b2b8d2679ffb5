"""Deltas: a trainable change of selected columns beside frozen layers, float, 8-bit or 4-bit."""

from torch_simu.deltas.attach import attach_deltas, attached_layers, detach_deltas, merge_deltas
from torch_simu.deltas.decode import decode_model
from torch_simu.deltas.export import WriteBack, write_back
from torch_simu.deltas.files import load_deltas, save_deltas
from torch_simu.deltas.trained import trained_groups
from torch_simu.deltas.widen import widen_deltas

__all__ = [
    "WriteBack",
    "attach_deltas",
    "attached_layers",
    "decode_model",
    "detach_deltas",
    "load_deltas",
    "merge_deltas",
    "save_deltas",
    "trained_groups",
    "widen_deltas",
    "write_back",
]
