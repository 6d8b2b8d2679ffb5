"""Another end of a run."""

from __future__ import annotations

from statistics import mean

from benchmarks.forgetting.cases import BATCH
from benchmarks.forgetting.tried.loop import Loop
from torch_simu.unlearning.metrics.scoring import score_answers


class UntilUnpredicted(Loop):
    """Ends when no more of the forget tokens are predicted than by the model that never saw them."""

    def ended(self) -> bool:
        assert self.case.retrained is not None
        bar = score_answers(self.case.retrained, self.case.sets["forget"], batch_size=BATCH)["em"]
        return mean(self.scores()["em"]) <= mean(bar)
