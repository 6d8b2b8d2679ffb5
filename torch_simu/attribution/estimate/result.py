"""What was summed, as an attribution."""

from __future__ import annotations

from collections.abc import Mapping

from torch_simu.attribution.attribution import Attribution
from torch_simu.attribution.methods.sums import LayerSum


def attribution_of(sums: Mapping[str, LayerSum], num_samples: int, provenance: Mapping[str, object]) -> Attribution:
    """Return the attribution that some sums are: with completeness or, of an estimate, standard errors.

    Args:
        sums: Layer -> its sum.
        num_samples: How many samples were summed.
        provenance: How the sums came about.
    """
    scores = {name: each.scores for name, each in sums.items()}
    if any(each.visits for each in sums.values()):
        return Attribution(
            scores,
            {},
            num_samples,
            provenance,
            standard_error={name: each.variance.sqrt() for name, each in sums.items() if each.variance is not None},
            difference={name: each.difference for name, each in sums.items() if each.difference is not None},
        )
    if any(each.unmeasured for each in sums.values()):
        return Attribution(scores, {}, num_samples, provenance)
    errors = {name: each.completeness_error for name, each in sums.items()}
    return Attribution(scores, errors, num_samples, provenance, {name: each.change_size for name, each in sums.items()})
