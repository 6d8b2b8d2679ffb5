"""Objectives: what an unlearning step descends, as weighted terms on a forget batch and a retain batch."""

from torch_simu.unlearning.objectives.answers import answer_log_probs, answer_logits, mean_answer_nll
from torch_simu.unlearning.objectives.divergence import KeepsPredictions
from torch_simu.unlearning.objectives.grad_diff import GradAscent, GradDiff
from torch_simu.unlearning.objectives.named import OBJECTIVES, RETAIN_TERMS, make_objective
from torch_simu.unlearning.objectives.objective import RETAIN_WEIGHT, Batch, Objective, Term
from torch_simu.unlearning.objectives.preference import NPO, SimNPO
from torch_simu.unlearning.objectives.probability import Probability
from torch_simu.unlearning.objectives.start import StartModel

__all__ = [
    "NPO",
    "OBJECTIVES",
    "RETAIN_TERMS",
    "RETAIN_WEIGHT",
    "Batch",
    "GradAscent",
    "GradDiff",
    "KeepsPredictions",
    "Objective",
    "Probability",
    "SimNPO",
    "StartModel",
    "Term",
    "answer_log_probs",
    "answer_logits",
    "make_objective",
    "mean_answer_nll",
]
