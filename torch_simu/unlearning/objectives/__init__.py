"""Objectives: what an unlearning step descends, as weighted terms on a forget batch and a retain batch."""

from torch_simu.unlearning.objectives.answers import (
    answer_log_probs,
    answer_logits,
    answer_predictions,
    label_log_probs,
    mean_answer_nll,
)
from torch_simu.unlearning.objectives.divergence import (
    EUL,
    ICU,
    KeepsPredictions,
    divergence_from_start,
    shannon_from_start,
)
from torch_simu.unlearning.objectives.grad_diff import GradAscent, GradDiff
from torch_simu.unlearning.objectives.hidden import RMU
from torch_simu.unlearning.objectives.named import OBJECTIVES, REFUSING, RETAIN_TERMS, make_objective
from torch_simu.unlearning.objectives.objective import RETAIN_WEIGHT, Batch, Objective, Term
from torch_simu.unlearning.objectives.preference import DPO, NPO, SimNPO
from torch_simu.unlearning.objectives.probability import Probability
from torch_simu.unlearning.objectives.refusals import IDK, JensUn, Refusals, refused, retargeted
from torch_simu.unlearning.objectives.start import StartModel
from torch_simu.unlearning.objectives.token_level import CEU, UNDIAL, WGA, SatImp

__all__ = [
    "CEU",
    "DPO",
    "EUL",
    "ICU",
    "IDK",
    "NPO",
    "OBJECTIVES",
    "REFUSING",
    "RETAIN_TERMS",
    "RETAIN_WEIGHT",
    "RMU",
    "UNDIAL",
    "WGA",
    "Batch",
    "GradAscent",
    "GradDiff",
    "JensUn",
    "KeepsPredictions",
    "Objective",
    "Probability",
    "Refusals",
    "SatImp",
    "SimNPO",
    "StartModel",
    "Term",
    "answer_log_probs",
    "answer_logits",
    "answer_predictions",
    "divergence_from_start",
    "label_log_probs",
    "make_objective",
    "mean_answer_nll",
    "refused",
    "retargeted",
    "shannon_from_start",
]
