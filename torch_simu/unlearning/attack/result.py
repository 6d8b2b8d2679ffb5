"""AttackResult: what the scored rows are after an attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from transformers import PreTrainedModel

from torch_simu._checks import problem
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.metrics.scoring import score_answers


@dataclass(frozen=True, slots=True)
class AttackPoint:
    """One measurement of the scored rows, as means over them.

    Attributes:
        probability: Of the answers; see `torch_simu.unlearning.metrics.scoring`, as for the extraction strength.
        es: Extraction strength.
        rate: Learning rate of the run; None where nothing is trained.
        step: Step of the run, from 1; None likewise.
    """

    probability: float
    es: float
    rate: float | None = None
    step: int | None = None

    def to_json(self) -> dict[str, object]:
        """Return the point as JSON knows it."""
        learned = {} if self.rate is None else {"rate": self.rate, "step": self.step}
        return {**learned, "probability": self.probability, "es": self.es}


@dataclass(frozen=True, slots=True)
class AttackResult:
    """What an attack came to.

    Attributes:
        before: The scored rows before it.
        trace: Every measurement, over all rates and steps; none where the attack was skipped.
        num_scored: How many rows were scored.
        num_taught: How many rows the attacker had.
        skipped: Why the attack was not made; empty where it was.

    Examples:
        >>> points = (AttackPoint(0.3, 0.5, 1e-4, 5), AttackPoint(0.2, 0.6, 1e-4, 10))
        >>> AttackResult(AttackPoint(0.1, 0.0), points, 4, 2).worst
        {'probability': 0.3, 'es': 0.6}
    """

    before: AttackPoint
    trace: Sequence[AttackPoint]
    num_scored: int
    num_taught: int = 0
    skipped: str = ""

    @property
    def probability(self) -> float:
        """The largest probability of the trace.

        Raises:
            ValueError: If the attack was skipped.
        """
        return max(point.probability for point in self._measured())

    @property
    def es(self) -> float:
        """The largest extraction strength of the trace, at whatever rate and step it is.

        Raises:
            ValueError: If the attack was skipped.
        """
        return max(point.es for point in self._measured())

    @property
    def worst(self) -> dict[str, float]:
        """Both, by name, as a report has them.

        Raises:
            ValueError: If the attack was skipped.
        """
        return {"probability": self.probability, "es": self.es}

    def to_json(self) -> dict[str, object]:
        """Return all of it as JSON knows it."""
        found: dict[str, object] = {"rows_taught": self.num_taught, "rows_scored": self.num_scored}
        found["before"] = self.before.to_json()
        if self.skipped:
            return {**found, "skipped": self.skipped}
        return {**found, **self.worst, "trace": [point.to_json() for point in self.trace]}

    def _measured(self) -> Sequence[AttackPoint]:
        if not self.trace:
            raise ValueError(problem(f"The attack has no figures ({self.skipped})", "one that was made"))
        return self.trace


def measure_scored(
    model: PreTrainedModel,
    scored: Sequence[Example],
    *,
    batch_size: int = 32,
    pad_id: int = 0,
    rate: float | None = None,
    step: int | None = None,
) -> AttackPoint:
    """Measure a model on the scored rows.

    `batch_size`, `pad_id` and the errors are as in `torch_simu.unlearning.metrics.scoring.score_answers`; the rate and
    the step are written into the result.
    """
    scores = score_answers(model, scored, batch_size=batch_size, pad_id=pad_id)
    return AttackPoint(fmean(scores["probability"]), fmean(scores["es"]), rate, step)
