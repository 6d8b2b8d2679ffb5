"""Attribution: which neurons the predictions of some samples rest on (step 1 of SIMU)."""

from torch_simu.attribution.attribute import attribute_neurons
from torch_simu.attribution.attribution import Attribution
from torch_simu.attribution.completeness import IncompleteError, check_complete

__all__ = ["Attribution", "IncompleteError", "attribute_neurons", "check_complete"]
