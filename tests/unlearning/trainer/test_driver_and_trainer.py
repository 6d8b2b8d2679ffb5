"""The driver and the Trainer are one method: from the same seed they make the same steps."""

from __future__ import annotations

import pytest
import torch

from tests.unlearning.trainer.trainer_runs import FORGET, RETAIN, SEED, STEPS, make_model, make_selection, make_trainer
from tests.unlearning.trainer.whitened_runs import OPTIONS, TOLERANCE, largest_difference, make_whitened_trainer
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.driver import unlearn

CONFIG = UnlearnConfig(
    method="simu_graddiff",
    lr=1e-2,
    rho=0.5,
    hessian_interval=2,
    weight_decay=0.1,
    retain_weight=2.0,
    forget_batch_size=4,
    retain_batch_size=4,
    hessian_batch_size=4,
    max_steps=STEPS,
    forget_target=None,
    seed=SEED,
)


def test_the_driver_and_the_trainer_make_the_same_steps_from_the_same_seed(tmp_path):
    driven, trained = make_model(), make_model()
    log = unlearn(driven, FORGET, RETAIN, config=CONFIG, selection=make_selection(driven)).log
    trainer = make_trainer(trained, tmp_path, options={"state_dtype": torch.float32})
    trainer.train()
    assert [record.get("refreshed", False) for record in log] == [True, False, True, False, True]
    before = dict(make_model().named_parameters())
    for (name, mine), theirs in zip(driven.named_parameters(), trained.parameters(), strict=True):
        # The Trainer pads its batches otherwise and adds up another order: only rounding differs.
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7, msg=name)
        assert torch.equal(mine, before[name]) == (".down_proj." not in name)


def test_another_seed_of_the_refresh_makes_other_steps(tmp_path):
    """The mutant: labels drawn from another seed, as the driver once did."""
    driven, trained = make_model(), make_model()
    unlearn(driven, FORGET, RETAIN, config=CONFIG, selection=make_selection(driven))
    make_trainer(trained, tmp_path, options={"state_dtype": torch.float32}, refresh_seed=SEED + 1).train()
    pairs = zip(driven.parameters(), trained.parameters(), strict=True)
    assert max((mine - theirs).abs().max().item() for mine, theirs in pairs) > 1e-5


SIMU = CONFIG.updated(
    method="simu", paced=False, lr=OPTIONS["lr"], betas=OPTIONS["betas"], hessian_interval=OPTIONS["hessian_interval"]
)


@pytest.mark.parametrize(("attention", "micro_batch"), [("frozen", 2), ("frozen", 4), ("full", 4)])
@pytest.mark.parametrize("curvature", ["neurons", "both"])
@pytest.mark.parametrize("rows", ["forget", "both"])
def test_the_driver_and_the_trainer_make_the_same_whitened_steps(tmp_path, curvature, attention, micro_batch, rows):
    driven, trained, before = make_model(), make_model(), make_model()
    config = SIMU.updated(curvature=curvature, attention=attention, covariance_of=rows)
    assert config.balance and config.objective == "probability"
    log = unlearn(driven, FORGET, RETAIN, config=config, selection=make_selection(driven)).log
    options = {"state_dtype": torch.float32}
    arguments = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": 4 // micro_batch}
    arguments |= {"attention": attention, "covariance_of": rows}
    make_whitened_trainer(trained, tmp_path, curvature, options=options, **arguments).train()
    assert [record.get("refreshed", False) for record in log] == [True, False, True, False, True]
    assert largest_difference(driven, trained) < TOLERANCE < 1e-4 * largest_difference(driven, before)


@pytest.mark.parametrize("retain_term", ["nll", "kl"])
def test_a_driver_whose_covariances_are_of_both_sets_makes_other_steps(retain_term):
    """Also where the start model runs on the retain rows, which is no pass of the model that trains."""
    both, alone = make_model(), make_model()
    for model, rows in ((both, "both"), (alone, "forget")):
        config = SIMU.updated(covariance_of=rows, retain_term=retain_term)
        unlearn(model, FORGET, RETAIN, config=config, selection=make_selection(model))
    assert largest_difference(both, alone) > 100 * TOLERANCE


def test_a_trainer_without_balance_makes_other_steps_than_the_driver(tmp_path):
    """The mutant: the method's balance forgotten."""
    driven, trained = make_model(), make_model()
    unlearn(driven, FORGET, RETAIN, config=SIMU, selection=make_selection(driven))
    make_whitened_trainer(trained, tmp_path, "both", options={"state_dtype": torch.float32}, balance=False).train()
    assert largest_difference(driven, trained) > 100 * TOLERANCE
