"""Layers: find those whose inputs are neurons, and say which dimension of their weight the neurons are."""

from torch_simu.layers.checks import check_kind, check_loaded, check_num_neurons, check_unshared, check_weight
from torch_simu.layers.groups import neuron_groups
from torch_simu.layers.kinds import (
    d_model,
    is_fused_experts,
    is_neuron_layer,
    kind_of,
    neuron_dim,
    neuron_weight,
    num_neurons,
    output_dim,
)
from torch_simu.layers.probe import probed_projections
from torch_simu.layers.projections import Selector, attention_projections, down_projections, select_layers
from torch_simu.layers.sources import Source, proved_rows, proved_sources, sources_beside

__all__ = [
    "Selector",
    "Source",
    "attention_projections",
    "check_kind",
    "check_loaded",
    "check_num_neurons",
    "check_unshared",
    "check_weight",
    "d_model",
    "down_projections",
    "is_fused_experts",
    "is_neuron_layer",
    "kind_of",
    "neuron_dim",
    "neuron_groups",
    "neuron_weight",
    "num_neurons",
    "output_dim",
    "probed_projections",
    "proved_rows",
    "proved_sources",
    "select_layers",
    "sources_beside",
]
