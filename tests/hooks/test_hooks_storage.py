"""Hooks capture what autograd says where weights are in other processes, offloaded, or codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from tests.hooks import hooks_run
from tests.hooks.hooked_network import PLAIN, Case, captured, naive_capture, retained
from tests.hooks.test_hooks_capture import tiny
from torch_simu.hooks import NeuronHookError, register_neuron_hooks

# Several processes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What went wrong in each scenario, in each of two processes."""
    folder = tmp_path_factory.mktemp("two")
    mp.spawn(hooks_run.run, args=(str(folder),), nprocs=2)
    return [json.loads((folder / f"outcomes{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in hooks_run.SCENARIOS])
def test_two_processes(outcomes: list[dict[str, str]], scenario: str) -> None:
    wrong = [each[scenario] for each in outcomes]
    assert wrong == ["", ""], "\n".join(wrong)


# Weights that are elsewhere, or are codes


USES = [PLAIN, replace(PLAIN, frozen=True), replace(PLAIN, keyword=True, checkpointing="non_reentrant")]


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("case", USES, ids=["plain", "frozen", "checkpointed"])
def test_offloaded_layers_are_captured_where_their_input_is(case: Case, place: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    net = case.network()
    if place == "cpu":
        accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(net, str(tmp_path), execution_device=torch.device("cpu"))
    assert net.down.weight.is_meta
    assert torch.equal(captured(net), torch.stack(naive_capture(case)))


def test_a_language_model_with_a_device_map_is_captured(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    whole = tiny("llama").eval()
    whole.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert model.get_submodule("model.layers.1.mlp.down_proj").weight.is_meta
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    names = [f"model.layers.{number}.mlp.down_proj" for number in (0, 1)]
    with retained(whole, names) as expected:
        whole(ids, labels=ids).loss.backward()
    with register_neuron_hooks(model, reduce=None) as hooks:
        model(ids, labels=ids).loss.backward()
    for name in names:
        assert torch.equal(hooks[name], torch.stack(expected[name]))


@pytest.mark.parametrize("reduce", ["attribution", None])
def test_what_a_model_without_data_gives_is_refused(reduce: str | None) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to("meta")
    with register_neuron_hooks(model, reduce=reduce) as hooks:
        model(torch.zeros(2, 3, device="meta")).sum().backward()
    message = "What was recorded for layer '2' is on the meta device, expected values. Load the model"
    with pytest.raises(NeuronHookError, match=message):
        hooks["2"]


WIDE = replace(PLAIN, d_model=32, d_ff=64)


def eight_bit(weight: Tensor) -> tuple[nn.Module, Tensor]:
    """An 8-bit layer and the weight that its codes stand for."""
    layer = pytest.importorskip("bitsandbytes").nn.Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu").requires_grad_(False)
    return layer, layer.weight.data * layer.weight.SCB[:, None] / 127


def four_bit(weight: Tensor) -> tuple[nn.Module, Tensor]:
    """A 4-bit layer and the weight that its codes stand for."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(*weight.shape[::-1], bias=False, quant_type="nf4")
    layer.load_state_dict({"weight": weight})
    layer = layer.to("cpu").requires_grad_(False)
    return layer, bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [eight_bit, four_bit])
def test_quantized_layers_are_captured_with_the_gradient_of_their_codes(
    quantize: Callable[[Tensor], tuple[nn.Module, Tensor]], dtype: torch.dtype, train: bool
) -> None:
    case = replace(WIDE, dtype=dtype, frozen=True)
    net = case.network()
    net.down, weight = quantize(net.down.weight.float())
    net.train(train)
    found = captured(net)
    assert torch.equal(found, torch.stack(naive_capture(case, net=net)))
    # The gradient of the sum of outputs is the sum of the rows that the codes stand for.
    x = found[0]
    with register_neuron_hooks(net.down, reduce=None) as hooks:
        net.down(x).sum().backward()
    expected = weight.sum(0).expand(len(x), -1)
    torch.testing.assert_close(hooks[""][1].float(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
