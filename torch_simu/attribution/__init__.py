"""Attribution: which neurons the predictions of some samples rest on (step 1 of SIMU)."""

from torch_simu.attribution.attribute import attribute_neurons
from torch_simu.attribution.attribution import Attribution

__all__ = ["Attribution", "attribute_neurons"]
