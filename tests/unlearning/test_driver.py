"""unlearn forgets the forget set and changes nothing it may not change."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from tests.models import EXPERTS, tiny
from torch_simu import NeuronSelection
from torch_simu.layers import attention_projections, down_projections
from torch_simu.unlearning import driver
from torch_simu.unlearning.config import METHODS, UnlearnConfig
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction, make_model
from torch_simu.unlearning.demo.memorize import TrainConfig, memorize
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.objectives import GradAscent, GradDiff, make_objective, mean_answer_nll
from torch_simu.unlearning.steps import NonFiniteLossError, make_hooks

RECIPE = DemoRecipe(
    num_forget=4,
    retain_per_forget=2,
    num_places=4,
    d_model=32,
    d_ff=64,
    num_layers=2,
    training=TrainConfig(epochs=60, lr=1e-2, batch_size=12),
)
FAST = UnlearnConfig(
    method="simu_graddiff",
    lr=1e-2,
    max_steps=6,
    forget_batch_size=6,
    retain_batch_size=6,
    attribution_steps=3,
    max_completeness_error=None,
)
LAST = "model.layers.1.mlp.down_proj.weight"


@functools.cache
def _memorized():
    fiction = make_fiction(RECIPE, seed=0)
    model = make_model(RECIPE, len(fiction.tokenizer), seed=0)
    rows = [example for part in fiction.examples.values() for example in part]
    em = memorize(model, rows, config=RECIPE.training)
    assert em > 0.9
    return model, fiction.examples


@pytest.fixture
def memorized():
    """A tiny model that memorized fiction, and its encoded sets; a copy, so that tests may change it."""
    model, examples = _memorized()
    return copy.deepcopy(model), examples


def weights(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def run(model, examples, config=FAST, **options):
    return unlearn(model, examples["forget"], examples["retain"], config=config, **options)


def test_the_forget_set_is_forgotten_more_than_the_retain_set(memorized):
    model, examples = memorized
    done = run(
        model,
        examples,
        FAST.updated(max_steps=80, forget_target=0.3, fraction=0.3),
        monitor={"retain": examples["retain"]},
    )
    assert done.reached and done.log[-1]["forget_probability"] <= 0.3
    assert all(record["forget_probability"] > 0.3 for record in done.log[:-1])
    assert done.log[-1]["monitor"]["retain"]["probability"] > 0.4


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_its_weights_and_no_others(memorized, method):
    model, examples = memorized
    before = weights(model)
    done = run(model, examples, FAST.updated(method=method, max_steps=2))
    changed = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    if method in ("fo_graddiff", "so_graddiff"):
        assert changed == set(before)
    elif method == "attention_only":
        assert changed == {name for name in before if "self_attn" in name}
    else:
        assert changed == {f"{layer}.weight" for layer in done.selection}
        for layer in done.selection:
            off = ~done.selection.mask(layer)
            after = model.get_submodule(layer).weight
            assert torch.equal(after[:, off], before[f"{layer}.weight"][:, off])
    differing = sum(int((param != before[name]).sum()) for name, param in model.named_parameters())
    assert done.changed_share == differing / sum(value.numel() for value in before.values())


def test_of_many_forget_rows_some_are_measured_and_all_say_whether_the_target_is_reached(memorized, monkeypatch):
    model, examples = memorized
    rows, counted = examples["forget"], []

    def counting(net, part, **options):
        counted.append(list(part))
        return score_answers(net, part, **options)

    monkeypatch.setattr(driver, "score_answers", counting)
    config = FAST.updated(max_steps=60, forget_target=0.3, fraction=0.3)
    done = run(copy.deepcopy(model), examples, config.updated(eval_rows=len(rows)))
    assert all(part == rows for part in counted)
    counted.clear()
    twin = run(model, examples, config.updated(eval_rows=len(rows) // 2))
    assert done.reached and twin.reached and counted[-1] == rows
    # Where the few say it the rest are asked: at the last steps only.
    assert sum(len(part) for part in counted) < 0.75 * len(rows) * twin.steps
    assert all(len({*map(id, part)} & {*map(id, rows)}) == len(part) for part in counted)
    last = score_answers(model, rows, batch_size=128)["probability"]
    assert twin.log[-1]["forget_probability"] == pytest.approx(sum(last) / len(last)) and sum(last) / len(last) <= 0.3


def test_nothing_is_differentiated_below_the_first_layer_that_trains(memorized):
    model, examples = memorized
    reached = []
    first, last = (block.mlp.down_proj for block in model.model.layers)
    for layer in (first, last):
        layer.register_forward_hook(lambda layer, _, out: reached.append((layer, out.requires_grad)))
    selection = NeuronSelection({"model.layers.1.mlp.down_proj": [3, 4]}, {"model.layers.1.mlp.down_proj": RECIPE.d_ff})
    for method in ("simu", "simu_graddiff"):
        run(model, examples, FAST.updated(method=method, max_steps=1), selection=selection)
    assert {flag for layer, flag in reached if layer is first} == {False}
    assert {flag for layer, flag in reached if layer is last} == {True, False}


@pytest.mark.parametrize("sets", ["forget", "both"])
def test_what_hooks_sum_is_forgotten_once_it_is_folded_in(memorized, monkeypatch, sets):
    model, examples = memorized
    made = []
    monkeypatch.setattr(driver, "make_hooks", lambda *given: made.append(make_hooks(*given)) or made[-1])
    held = []

    class Watched(GradDiff):
        def terms(self, model, forget, retain):
            for term in super().terms(model, forget, retain):
                yield term
                held.append([any(map(hooks.recorded, hooks.layers)) for hooks in made])

    config = FAST.updated(method="simu", covariance_of=sets, max_steps=2, hessian_interval=1, lr=0.04, fraction=1.0)
    run(model, examples, config, objective=Watched())
    (hooks,) = made
    assert len(hooks.layers) == RECIPE.num_layers and not any(map(hooks.recorded, hooks.layers))
    # Of the forget set alone before the retain term is made.
    assert held == 4 * [[sets == "both"]]


def test_optimizer_state_is_that_of_the_selected_neurons(memorized):
    model, examples = memorized
    done = run(model, examples)
    entries = RECIPE.d_model * done.selection.num_selected
    assert done.optimizer_bytes == 2 * 4 * entries + 4 * len(done.selection)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(memorized):
    model, examples = memorized
    results = []
    for seed in (0, 0, 1):
        twin = copy.deepcopy(model)
        run(twin, examples, FAST.updated(seed=seed))
        results.append(twin.lm_head.weight if seed == 2 else twin.model.layers[0].mlp.down_proj.weight)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_modes_and_requires_grad_and_gradients_are_left_as_they_were(memorized):
    model, examples = memorized
    model.train()
    model.lm_head.weight.requires_grad_(False)
    flags = {name: param.requires_grad for name, param in model.named_parameters()}
    run(model, examples)
    assert model.training and model.model.layers[0].training
    assert {name: param.requires_grad for name, param in model.named_parameters()} == flags
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("method", ["all_neurons", "simu"])
def test_a_loss_that_is_not_finite_stops_before_a_weight_changes(memorized, method):
    model, examples = memorized
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    before = weights(model)
    config = FAST.updated(method=method)
    with pytest.raises(
        NonFiniteLossError, match=r"The loss of step 1 is nan, expected a finite number. Lower lr \(it is 0.01\)"
    ):
        run(model, examples, config)
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters() if name != "lm_head.weight")


def test_a_gradient_that_is_large_and_finite_is_stepped_with(memorized):
    model, examples = memorized
    # The square of it is not.
    model.get_parameter(LAST).register_hook(lambda gradient: torch.full_like(gradient, 1e30))
    done = run(model, examples, FAST.updated(method="all_neurons", max_steps=1))
    assert done.changed_share > 0


@pytest.mark.parametrize("which", ["forget", "retain"])
def test_an_empty_set_is_refused(memorized, which):
    model, examples = memorized
    with pytest.raises(ValueError, match=f"The {which} set is empty"):
        run(model, {**examples, which: []})


def test_a_given_selection_is_trained_as_it_is(memorized):
    model, examples = memorized
    selection = NeuronSelection({"model.layers.1.mlp.down_proj": [3]}, {"model.layers.1.mlp.down_proj": 64})
    done = run(model, examples, selection=selection)
    assert done.selection == selection and done.changed_share > 0


@pytest.mark.parametrize("rule", ["contrast", "top", "threshold"])
def test_every_rule_selects_critical_neurons(memorized, rule):
    model, examples = memorized
    done = run(model, examples, FAST.updated(rule=rule, max_steps=1))
    assert 0 < done.selection.fraction < 1 and done.attribution is not None


def test_objectives_are_their_formula(memorized):
    model, examples = memorized
    from torch_simu.unlearning.data.examples import collate

    forget, retain = (collate(examples[name][:3], 0) for name in ("forget", "retain"))
    f, r = mean_answer_nll(model, forget), mean_answer_nll(model, retain)
    # The model's own loss is the mean over scored tokens, computed by transformers.
    assert f.item() == pytest.approx(model(**forget).loss.item(), rel=1e-5)

    def total(objective):
        return sum(term.weight * term.loss for term in objective.terms(model, forget, retain)).item()

    assert total(GradAscent()) == pytest.approx(-f.item())
    assert total(make_objective("grad_diff", retain_weight=3.0)) == pytest.approx((3 * r - f).item())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "simu_gradif"}, "method is 'simu_gradif', expected one of .*Did you mean 'simu_graddiff'"),
        ({"objective": "ascent"}, "objective is 'ascent', expected one of 'grad_diff', 'grad_ascent'"),
        ({"fraction": 0.0}, r"fraction is 0.0, expected a finite number in \(0, 1\]"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"max_steps": 0}, "max_steps is 0, expected a whole number >= 1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"seed": 0.5}, "seed is 0.5 of type float"),
    ],
)
def test_choices_out_of_bounds_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        UnlearnConfig(**options)


def test_a_negative_retain_weight_is_refused():
    with pytest.raises(ValueError, match="retain_weight is -1"):
        GradDiff(-1.0)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_that_no_hook_sees_are_refused_with_what_works(name):
    model = tiny(name)
    row = Example((5, 6, 7, 8), (-100, 6, 7, 8))
    config = FAST.updated(method="simu", max_steps=1)
    before = weights(model)
    with pytest.raises(ValueError, match=r"inside experts fused into one parameter, .*method simu_graddiff"):
        unlearn(model, [row], [row], config=config)
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    done = unlearn(model, [row], [row], config=config.updated(method="all_neurons"))
    assert done.changed_share > 0


def test_attention_steps_by_covariances_as_if_its_inputs_were_selected(memorized):
    model, examples = memorized
    config = FAST.updated(method="simu", lr=0.04, max_steps=3)
    full = {name: layer for part in (down_projections, attention_projections) for name, layer in part(model).items()}
    chosen = NeuronSelection.full(model, list(full))
    models = [copy.deepcopy(model) for _ in range(2)]
    unlearn(models[0], examples["forget"], examples["retain"], config=config.updated(attention="full"))
    unlearn(models[1], examples["forget"], examples["retain"], config=config, selection=chosen)
    for name, param in model.named_parameters():
        found, wanted = (each.get_parameter(name) for each in models)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert torch.equal(found, param) == (name.removesuffix(".weight") not in full)
