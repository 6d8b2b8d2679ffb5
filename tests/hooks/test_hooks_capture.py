"""Hooks capture what flows into the selected layers, summed or kept, on any module."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.hooks.hooked_network import PLAIN, Case, cases, loss_of, naive_capture
from tests.strategies import normal, seeds
from torch_simu.hooks import NeuronHookError, register_neuron_hooks

pytestmark = pytest.mark.usefixtures("device")

NAIVE_SUMS = {
    "attribution": lambda a, g: (a * g).sum(0),
    "act": lambda a, g: a.sum(0),
    "grad": lambda a, g: g.sum(0),
    "sq": lambda a, g: ((a * g) ** 2).sum(0),
}


@given(
    case=cases, name=st.sampled_from(sorted(NAIVE_SUMS)), accum_dtype=st.sampled_from([torch.float32, torch.float64])
)
def test_sums_over_two_batches_equal_the_naive_sums(case: Case, name: str, accum_dtype: torch.dtype) -> None:
    net = case.network()
    with register_neuron_hooks(net, "down", reduce=name, accum_dtype=accum_dtype) as hooks:
        for number in (0, 1):
            loss_of(net(case.inputs(number))).backward()
    kept = [[tensor.double() for tensor in naive_capture(case, number)] for number in (0, 1)]
    expected = sum(NAIVE_SUMS[name](*pair) for pair in kept)
    magnitude = sum(NAIVE_SUMS[name](*(tensor.abs() for tensor in pair)) for pair in kept)
    assert hooks["down"].dtype == accum_dtype
    if magnitude.isfinite().all():
        # float32 sums of at most 48 products of two numbers, relative to the sum of magnitudes.
        assert ((hooks["down"].double() - expected).abs() <= 1e-5 * magnitude + 1e-30).all()


@given(case=cases.filter(lambda case: not case.twice), data=st.data())
def test_only_positions_in_the_mask_count_and_the_mask_follows_the_batch(case: Case, data: st.DataObject) -> None:
    net, size = case.network(), case.batch * case.num_tokens
    masks = [torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))) for _ in range(2)]
    with register_neuron_hooks(net, "down", reduce=None) as hooks:
        for number, mask in enumerate(masks):
            hooks.position_mask = mask.view(case.batch, case.num_tokens)
            assert torch.equal(hooks.position_mask.flatten(), mask)
            loss_of(net(case.inputs(number))).backward()
    expected = torch.cat([torch.stack(naive_capture(case, number))[:, mask] for number, mask in enumerate(masks)], 1)
    assert torch.equal(hooks["down"], expected)


def test_a_mask_counts_positions_where_the_model_flattens_them() -> None:
    layer = nn.Linear(3, 2)
    mask = torch.tensor([[True, False], [False, True]])
    with register_neuron_hooks(layer, reduce=None, position_mask=mask) as hooks:
        layer(torch.arange(12.0).view(4, 3)).sum().backward()
    assert hooks[""][0].tolist() == [[0.0, 1.0, 2.0], [9.0, 10.0, 11.0]]


def test_a_callable_reduction_is_summed_over_calls() -> None:
    layer, x = nn.Linear(3, 2), normal(1, 4, 3)
    with register_neuron_hooks(layer, reduce=lambda activation, gradient: activation.T @ gradient) as hooks:
        for _ in range(2):
            layer(x).sum().backward()
    assert torch.allclose(hooks[""], 2 * x.T @ layer.weight.detach().sum(0).expand(4, 3))


def test_a_second_backward_through_a_retained_graph_counts_twice() -> None:
    net = PLAIN.network()
    with register_neuron_hooks(net, "down") as hooks:
        loss = loss_of(net(PLAIN.inputs()))
        loss.backward(retain_graph=True)
        once = hooks["down"].clone()
        loss.backward()
    assert torch.allclose(hooks["down"], 2 * once)


def test_second_derivatives_pass_through_a_tap() -> None:
    grads = []
    for hooked in (False, True):
        net, x = PLAIN.network(), PLAIN.inputs().requires_grad_()
        with register_neuron_hooks(net) if hooked else contextlib.nullcontext():
            (slope,) = torch.autograd.grad(loss_of(net(x)), x, create_graph=True)
            slope.square().sum().backward()
        grads.append([param.grad for param in net.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_not_a_number_passes_through() -> None:
    layer = nn.Linear(2, 1)
    with register_neuron_hooks(layer) as hooks:
        layer(torch.tensor([[float("nan"), 1.0]])).sum().backward()
    assert hooks[""].isnan().tolist() == [True, False]


def test_values_that_were_read_do_not_change_later() -> None:
    layer = nn.Linear(2, 1)
    with register_neuron_hooks(layer, reduce="act") as hooks:
        layer(torch.ones(1, 2)).sum().backward()
        read = hooks[""]
        layer(torch.ones(1, 2)).sum().backward()
    assert read.tolist() == [1.0, 1.0]
    assert hooks[""].tolist() == [2.0, 2.0]


def test_an_input_without_gradient_is_captured_and_gets_none_afterwards() -> None:
    layer, x = nn.Linear(2, 1).requires_grad_(False), torch.ones(3, 2)
    with register_neuron_hooks(layer) as hooks:
        layer(x).sum().backward()
    assert torch.allclose(hooks[""], 3 * layer.weight[0])
    assert not x.requires_grad and x.grad is None


@given(named=st.booleans(), keyword=st.booleans(), seed=seeds)
def test_an_argument_is_found_by_position_or_name_however_it_is_passed(named: bool, keyword: bool, seed: int) -> None:
    class Mixer(nn.Module):
        def forward(self, ids: Tensor, hidden: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
            return {"out": scale * hidden[ids]}

    mixer, hidden, ids = Mixer(), normal(seed, 3, 2), torch.tensor([0, 2])
    with register_neuron_hooks(mixer, arg="hidden" if named else 1, reduce=None) as hooks:
        out = mixer(ids, hidden=hidden, scale=2.0) if keyword else mixer(ids, hidden, scale=2.0)
        out["out"].sum().backward()
    assert torch.equal(hooks[""][0], hidden)
    assert hooks[""][1].tolist() == [[2.0, 2.0], [0.0, 0.0], [2.0, 2.0]]


@pytest.mark.parametrize("nested", [False, True], ids=["the layer", "inside it"])
def test_layers_that_work_in_place_get_a_copy(nested: bool) -> None:
    relu = nn.ReLU(inplace=True)
    layer = nn.Sequential(relu) if nested else relu
    x = torch.tensor([[-1.0, 2.0]])
    with register_neuron_hooks(layer, lambda name, module: module is layer, reduce=None) as hooks:
        layer(x).sum().backward()
    assert hooks[""].tolist() == [[[-1.0, 2.0]], [[0.0, 1.0]]]
    assert x.tolist() == [[-1.0, 2.0]]


def test_paused_hooks_record_nothing_and_pauses_nest() -> None:
    layer = nn.Linear(2, 1)
    with register_neuron_hooks(layer, reduce="act") as hooks:
        layer(torch.ones(1, 2)).sum().backward()
        with hooks.pause():
            with hooks.pause():
                loss = layer(torch.ones(1, 2)).sum()
            layer(torch.ones(1, 2)).sum().backward()
        loss.backward()
    assert hooks[""].tolist() == [1.0, 1.0]


def test_a_pause_ends_with_an_exception() -> None:
    layer = nn.Linear(2, 1)
    with register_neuron_hooks(layer, reduce="act") as hooks:
        with pytest.raises(OSError, match="inside"), hooks.pause():
            raise OSError("inside")
        layer(torch.ones(1, 2)).sum().backward()
    assert hooks[""].tolist() == [1.0, 1.0]


def test_reset_forgets_what_was_recorded_and_keeps_the_hooks() -> None:
    layer = nn.Linear(2, 1)
    with register_neuron_hooks(layer, reduce="act") as hooks:
        layer(torch.ones(5, 2)).sum().backward()
        hooks.reset()
        with pytest.raises(NeuronHookError, match="never called"):
            hooks[""]
        layer(torch.ones(1, 2)).sum().backward()
    assert hooks[""].tolist() == [1.0, 1.0]


def test_reset_of_some_layers_leaves_the_others() -> None:
    layers = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    with register_neuron_hooks(layers, ["0", "1"], reduce="covariance", outputs=True) as hooks:
        layers(torch.ones(5, 2)).sum().backward()
        hooks.reset("0")
        assert not hooks.recorded("0") and set(hooks.outputs) == {"1"}
        assert hooks.recorded("1")
        with pytest.raises(KeyError, match="Layer '2' has no hook, expected one of"):
            hooks.reset("1", "2")
    assert hooks.recorded("1")


def tiny(family: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 2}
    if family == "gpt2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = transformers.GPT2Config(n_embd=8, n_head=2, n_inner=12, **dropout, **sizes)
    elif family == "opt":
        shape = {"hidden_size": 8, "ffn_dim": 12, "num_attention_heads": 2, "word_embed_proj_dim": 8}
        config = transformers.OPTConfig(dropout=0.0, **shape, **sizes)
    else:
        config = transformers.LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_down_projections_of_a_language_model_are_hooked_also_under_checkpointing(family: str) -> None:
    model = tiny(family).train()
    ids = torch.tensor([[3, 4, 5], [6, 7, 0]])
    mask = ids != 0
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.where(mask, -100)}
    records = []
    for use_reentrant in (None, False, True):
        if use_reentrant is not None:
            # Under its older name in the first versions of transformers 5.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        with register_neuron_hooks(model, position_mask=mask) as hooks:
            model(**batch, use_cache=False).loss.backward()
        assert [values.shape for values in hooks.values()] == [(12,), (12,)]
        records.append(hooks)
    plain, *others = records
    for other in others:
        for name in plain:
            torch.testing.assert_close(other[name], plain[name], rtol=1e-5, atol=1e-8)


def test_all_linear_layers_are_hooked_where_the_module_is_no_language_model() -> None:
    net = nn.Sequential(nn.Conv1d(1, 2, 1), nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1))
    with register_neuron_hooks(net) as hooks:
        net(torch.ones(2, 1, 3)).sum().backward()
    assert {name: values.shape for name, values in hooks.items()} == {"2": (6,), "4": (4,)}


def test_hooks_are_a_mapping_of_the_selected_layers() -> None:
    hooks = register_neuron_hooks(PLAIN.network(), ["down"])
    assert (list(hooks), len(hooks), "down" in hooks, "up" in hooks) == (["down"], 1, True, False)
    assert repr(hooks) == "NeuronHooks(['down'])"


def test_eight_bit_layers_are_captured_with_their_own_activations() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(8, 4, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": normal(3, 4, 8)})
    layer = layer.to("cpu").requires_grad_(False).train()
    x = normal(4, 2, 8)
    with register_neuron_hooks(layer, reduce=None) as hooks:
        layer(x).sum().backward()
    assert torch.equal(hooks[""][0], x)
    assert hooks[""][1].abs().sum() > 0
