"""Attribution leaves the model as it was, refuses what it cannot do exactly, and goes on after an interruption."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.attribution.reference_attribution import lively, loosely, reference
from tests.models import tiny
from tests.pages.architectures import made
from torch_simu.attribution import Attribution, attribute_neurons
from torch_simu.attribution.site import Site

METHODS = ("auto", "packed", "decode", "prefix", "layerwise", "joint")
BATCH = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": torch.tensor([[5, 6, -100, 8]])}


def state_of(model: nn.Module) -> list[object]:
    hooks = [
        (
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            len(module._backward_hooks),
            "forward" in vars(module),
        )
        for module in model.modules()
    ]
    modes = [module.training for module in model.modules()]
    parameters = [(id(param), param.requires_grad, param.grad, param._version) for param in model.parameters()]
    return [hooks, modes, parameters, torch.is_grad_enabled()]


def trained(name: str = "llama") -> nn.Module:
    """A model in mixed modes, with gradients and some frozen parameters."""
    model = copy.deepcopy(lively(name)).train()
    model.get_submodule("model.layers.0.mlp").eval()
    for index, param in enumerate(model.parameters()):
        param.requires_grad_(index % 3 != 0)
        param.grad = torch.ones_like(param) if index % 3 == 1 else None
    return model


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_left_as_it_was(method: str) -> None:
    model = trained()
    before = state_of(model)
    with torch.no_grad():
        attribution = loosely(model, [BATCH], method=method, steps=2)
    assert all(scores.any() for scores in attribution.scores.values())
    after = state_of(model)
    assert before == after


@pytest.mark.parametrize("failure", ["progress", "forward"])
@pytest.mark.parametrize("method", METHODS[1:])
def test_the_model_is_left_as_it_was_even_after_an_exception(method: str, failure: str) -> None:
    model = trained()
    calls = 0

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if failure == "progress" or calls == 2:
            raise RuntimeError("stopped on purpose")

    handle = None if failure == "progress" else model.get_submodule("model.norm").register_forward_pre_hook(fail)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="stopped on purpose"):
        loosely(
            model,
            [BATCH],
            method=method,
            steps=2,
            max_completeness_error=None,
            progress=fail if handle is None else None,
        )
    assert state_of(model) == before


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_switched_off(outer: type[torch.no_grad]) -> None:
    with outer():
        attribution = loosely(lively("llama"), [BATCH], steps=2)
    assert attribution.num_samples == 2


def test_randomness_of_the_caller_is_left_alone() -> None:
    before = torch.get_rng_state()
    loosely(trained(), [BATCH], steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_the_selected_layers_are_scored_in_the_order_of_the_model() -> None:
    model = lively("llama")
    attribution = loosely(model, [BATCH], select=r"layers\.1\.self_attn\.o_proj|layers\.0\.mlp\.down_proj")
    assert list(attribution.scores) == ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    rows = [(BATCH["input_ids"][0], BATCH["labels"][0])]
    for layer, scores in attribution.scores.items():
        expected = reference(model, rows, layer, "logprob", "midpoint", 10).scores
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5 * expected.norm().item())


def test_progress_counts_samples_times_layers() -> None:
    calls: list[tuple[int, int]] = []
    loosely(lively("llama"), [BATCH], progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 4), (4, 4)]


def test_recurrent_mixers_are_refused_by_packed_and_run_by_prefix() -> None:
    model = tiny("mamba")
    with pytest.raises(ValueError, match=r"has no key-value cache|mixes positions by a recurrent state"):
        loosely(model, [BATCH], select="mixer.out_proj", method="packed")
    with pytest.warns(UserWarning, match="For MambaForCausalLM, packed does not apply .* decode does not apply"):
        attribution = loosely(model, [BATCH], select="mixer.out_proj", steps=2)
    rows = [(BATCH["input_ids"][0], BATCH["labels"][0])]
    for layer, scores in attribution.scores.items():
        expected = reference(model, rows, layer, "logprob", "midpoint", 2).scores
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-5 * expected.norm().item())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"_attn_implementation": "flex_attention"}, "attention implementation is 'flex_attention'"),
        ("llama", {"layer_types": ["full_attention", "conv"]}, "mixes positions by conv"),
        ("bloom", {}, "takes no position_ids"),
        ("gpt_neo", {}, "builds its own local mask"),
    ],
)
def test_packed_refuses_models_it_would_be_wrong_on(name: str, change: dict[str, object], message: str) -> None:
    model = tiny(name)
    for key, value in change.items():
        object.__setattr__(model.config, key, value)
    with pytest.raises(ValueError, match=message):
        loosely(model, [BATCH], method="packed")


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "There are 0 batches"),
        ([{**BATCH, "labels": torch.full((1, 4), -100)}], ValueError, "None of the labels in 1 batches is scored"),
        ([{**BATCH, "labels": torch.tensor([[5, -100, -100, -100]])}], ValueError, "None of the labels"),
        ([{**BATCH, "attention_mask": torch.zeros(1, 4).long(), "labels": torch.full((1, 4), -100)}],
         ValueError, "None of the labels"),
        ([{**BATCH, "attention_mask": torch.tensor([[1, 0, 1, 1]]), "labels": torch.tensor([[-100, -100, -100, 8]])}],
         ValueError, r"attention_mask has a hole in \[1, 0, 1, 1\]"),
        ([{**BATCH, "attention_mask": torch.tensor([[0, 1, 1, 1]])}], ValueError, "labels score padding"),
        ([{**BATCH, "attention_mask": torch.tensor([[0, 1, 2, 1]])}], ValueError, r"attention_mask holds \[0, 1, 2\]"),
        ([{**BATCH, "labels": torch.tensor([[5, 6, -1, 8]])}], ValueError, "labels hold -1"),
        ([{**BATCH, "labels": torch.tensor([5, 6, 7, 8])}], ValueError, r"input_ids \(1, 4\), labels \(4,\)"),
        ([{"input_ids": BATCH["input_ids"]}], KeyError, "A batch has no 'labels'"),
        ([{"labels": BATCH["labels"]}], KeyError, "A batch has no 'input_ids'"),
        ([BATCH["input_ids"]], TypeError, "A batch is of type Tensor"),
        ([{**BATCH, "input_ids": [[1, 2]]}], TypeError, "input_ids is of type list"),
        ([{**BATCH, "labels": torch.zeros(1, 4)}], TypeError, "labels is of type torch.float32"),
    ],
)  # fmt: skip
def test_malformed_batches_are_named(batches: list[object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loosely(lively("llama"), batches)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "pakced"}, ValueError, "method is 'pakced'.*Did you mean 'packed'"),
        ({"objective": "logprop"}, ValueError, "objective is 'logprop'"),
        ({"rule": "middle"}, ValueError, "rule is 'middle'"),
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"steps": 2.0}, TypeError, "steps is 2.0"),
        ({"select": "no_such"}, ValueError, "'no_such' matches no layer"),
        ({"group": "world"}, TypeError, "group is a str, expected a ProcessGroup"),
    ],
)
def test_unknown_options_are_named(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        loosely(lively("llama"), [BATCH], **options)


class Twice(nn.Module):
    """A model whose layers are used twice, and not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> object:
        return self.used(self.used(nn.functional.one_hot(input_ids, 4).float()))


@pytest.mark.parametrize(
    ("layer", "message"), [("used", "Call 2 of layer 'used'"), ("idle", "Layer 'idle' is not used in the forward pass")]
)
def test_layers_that_are_not_called_once_are_refused(layer: str, message: str) -> None:
    model = Twice()
    ids = torch.tensor([[1, 2, 3]])
    with (
        pytest.raises(ValueError, match=message),
        Site(layer, model.get_submodule(layer), 1, 3, [1.0], lambda whole: whole[0], lambda leaf, _: leaf).scaled(),
    ):
        model(ids)
    assert not model.get_submodule(layer)._forward_pre_hooks


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("xlnet", r"ff.layer_2' in one pass has input shape \(1, \d, \d+\), expected one call with \d x 1 tokens"),
        ("inkling_text", r"Experts 'model.layers.0.mlp.shared_experts' are called with \['gammas'\] by name"),
    ],
)
def test_layers_that_do_not_get_rows_of_tokens_by_position_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attribute_neurons(made(name), [BATCH], method="prefix", steps=2)


def test_a_layer_that_gets_tokens_before_rows_is_refused_in_any_pass_of_more_rows_than_tokens_or_fewer() -> None:
    layer = nn.Linear(4, 4)
    for streams, tokens in ((1, 3), (3, 1), (2, 3)):
        site = Site("layer", layer, streams, tokens, [1.0], lambda whole: whole, lambda leaf, _: leaf[0])
        with site.scaled():
            layer(torch.ones(streams, tokens, 4))
        with pytest.raises(ValueError, match=f"expected one call with {streams} x {tokens} tokens"), site.scaled():
            layer(torch.ones(tokens, streams, 4))


def test_provenance_says_how_the_scores_came_about() -> None:
    attribution = loosely(lively("llama"), [BATCH], rule="right", steps=4, objective="prob")
    assert isinstance(attribution, Attribution)
    expected = {"objective": "prob", "rule": "right", "steps": 4, "method": "packed", "model_type": "llama"}
    assert expected.items() <= attribution.provenance.items()
    assert {len(str(attribution.provenance[key])) for key in ("model", "weights")} == {64}


NAMES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
@pytest.mark.parametrize("blocks", [None, ["LlamaDecoderLayer"]], ids=["layers", "blocks"])
@pytest.mark.parametrize("offloaded", NAMES[:3])
def test_a_model_of_which_a_part_is_offloaded_is_attributed_as_it_is_whole(
    offloaded: str, blocks: list[str] | None, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    whole = lively("llama")
    places = {name: "disk" if name == offloaded else "cpu" for name in NAMES}
    parted = accelerate.dispatch_model(
        copy.deepcopy(whole),
        places,
        main_device="cpu",
        offload_dir=tmp_path,
        force_hooks=True,
        preload_module_classes=blocks,
    )
    assert any(param.is_meta for param in parted.get_submodule(offloaded).parameters())
    expected, found = (loosely(model, [BATCH], method="packed", steps=2) for model in (whole, parted))
    assert all(torch.equal(found.scores[name], scores) for name, scores in expected.scores.items())


@pytest.mark.parametrize("place", ["processor", "disk"])
def test_a_model_that_is_offloaded_whole_is_refused(place: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = copy.deepcopy(lively("llama"))
    if place == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    message = (
        "All weights are offloaded, first those of layer 'model.embed_tokens', expected a layer on the device that "
        "computes. Load the model without offloading"
    )
    with pytest.raises(ValueError, match=message):
        attribute_neurons(model, [BATCH])


@pytest.mark.parametrize("layer", ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.norm"])
def test_a_layer_without_data_is_refused(layer: str) -> None:
    model = copy.deepcopy(lively("llama"))
    model.get_submodule(layer).to("meta")
    message = f"The weights of layer '{layer}' are on the meta device, expected data. Load the model first"
    with pytest.raises(ValueError, match=message):
        attribute_neurons(model, [BATCH])
