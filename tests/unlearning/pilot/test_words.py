"""The printed command is read as the configuration that it was made of, whatever that is."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unlearning.pilot.test_tries import made
from torch_simu.cli.app import main
from torch_simu.cli.commands import jobs as commands
from torch_simu.unlearning.config import METHODS, UnlearnConfig
from torch_simu.unlearning.pilot.candidates import candidates
from torch_simu.unlearning.pilot.words import AS_GIVEN, as_changed, command_line, one_batch_size

configs = st.builds(
    lambda method, size, changes: one_batch_size(UnlearnConfig(method=method, **changes), size),
    st.sampled_from(list(METHODS)),
    st.integers(1, 64),
    st.fixed_dictionaries(
        {},
        optional={
            "retain_weight": st.floats(0.0, 9.0),
            "retain_term": st.sampled_from(["nll", "kl"]),
            "rehearsal": st.integers(0, 50),
            "objective": st.sampled_from(["probability", "grad_diff"]),
            "balance": st.booleans(),
            "adversary_lr": st.floats(1e-9, 1.0),
            "adversary_interval": st.integers(1, 50),
            "rule": st.sampled_from(["contrast", "top", "threshold"]),
            "fraction": st.floats(0.01, 1.0),
            "scope": st.sampled_from(["layer", "global"]),
            "attention": st.sampled_from(["frozen", "full"]),
            "layers": st.sampled_from(["mlp.down_proj|self_attn.o_proj", "a b"]),
            "attribution_steps": st.integers(1, 50),
            "attribution_budget": st.sampled_from([31, "10m"]),
            "attribution_rows": st.integers(1, 50),
            "max_completeness_error": st.floats(0.0, 1.0),
            "curvature": st.just("gnb"),
            "damping": st.floats(0.001, 2.0),
            "lr": st.floats(1e-12, 10.0),
            "paced": st.booleans(),
            "betas": st.tuples(st.floats(0.0, 0.999), st.floats(0.0, 0.999)),
            "rho": st.floats(0.0, 100.0),
            "weight_decay": st.floats(0.0, 1.0),
            "clip": st.floats(0.01, 2.0),
            "hessian_interval": st.integers(1, 50),
            "max_steps": st.integers(1, 5000),
            "forget_target": st.floats(0.0, 1.0),
            "checkpoint_interval": st.integers(1, 50),
            "seed": st.integers(0, 99),
        },
    ),
)


def read(line: str) -> tuple[UnlearnConfig, tuple[object, ...]]:
    """The configuration and the other arguments that the command line hands to the job."""
    found = []

    def job(model, sets, out, config, **_):
        found.append((config, (model, dict(sets), str(out))))
        raise ValueError("stopped")

    before, commands.unlearn_job = commands.unlearn_job, job
    try:
        words = shlex.split(line)
        assert words[0] == "torch-simu"
        with pytest.raises(SystemExit):
            main(words[1:])
    finally:
        commands.unlearn_job = before
    return found[0]


@given(configs)
def test_a_command_gives_back_its_configuration(config):
    line = command_line({"model": "my model", "forget": "f'", "retain": "r", "out": "o"}, config)
    assert read(line) == (config, ("my model", {"forget": "f'", "retain": "r"}, "o"))


@given(configs)
def test_every_candidate_has_a_name_of_its_own(config):
    assert as_changed(config, config) == AS_GIVEN
    tries = [made(config=config)]
    names = [as_changed(each, config) for each in candidates(config, tries, num_forget=99)]
    assert len({AS_GIVEN, *names}) == 1 + len(names) and all(name.startswith("--") for name in names)


def test_one_change_is_one_option():
    assert as_changed(UnlearnConfig(paced=False), UnlearnConfig()) == "--no-paced"
    assert as_changed(one_batch_size(UnlearnConfig(), 32), one_batch_size(UnlearnConfig())) == "--batch-size 32"
    assert as_changed(UnlearnConfig(betas=(0.5, 0.8)), UnlearnConfig()) == "--betas 0.5,0.8"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_interval": 3}, "eval_interval is 3, expected 1. It has no option."),
        ({"forget_target": None}, "forget_target is None, expected 0.1. It has no option."),
        ({"forget_batch_size": 4}, "The batch sizes are .*'forget_batch_size': 4.*, expected one for all"),
    ],
)
def test_a_choice_without_an_option_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        command_line({}, one_batch_size(UnlearnConfig()).updated(**changes))
