"""The neurons of a convolution are its input channels, and its positions are all entries of batch and space."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.hooks.hooked_network import loss_of
from tests.hooks.test_hooks_capture import NAIVE_SUMS
from tests.strategies import generator, normal, seeds
from torch_simu.hooks import NeuronHookError, register_neuron_hooks, tap

pytestmark = pytest.mark.usefixtures("device")

KINDS = [(nn.Conv1d, nn.ConvTranspose1d), (nn.Conv2d, nn.ConvTranspose2d), (nn.Conv3d, nn.ConvTranspose3d)]


@dataclass(frozen=True)
class Convolution:
    """A convolution over `len(space)` dimensions, and a batch for it; `batch` None: one image without a batch."""

    batch: int | None
    channels: int
    space: tuple[int, ...]
    kernel: int
    stride: int
    grouped: bool
    transposed: bool
    channels_last: bool
    dtype: torch.dtype
    seed: int

    def layer(self) -> nn.Module:
        """The layer, with weights made of the seed."""
        kind = KINDS[len(self.space) - 1][self.transposed]
        groups = self.channels if self.grouped else 1
        options = {"stride": self.stride, "padding": 1, "groups": groups, "dtype": self.dtype}
        layer = kind(self.channels, 2 * groups, self.kernel, **options)
        for number, param in enumerate(layer.parameters()):
            param.data.copy_(normal(self.seed + number, *param.shape))
        return layer

    def inputs(self) -> Tensor:
        """The batch, in either memory layout."""
        leading = () if self.batch is None else (self.batch,)
        x = normal(self.seed + 17, *leading, self.channels, *self.space, dtype=self.dtype)
        return x.movedim(self.dim, -1).contiguous().movedim(-1, self.dim) if self.channels_last else x

    @property
    def dim(self) -> int:
        """Which dimension of the batch holds the channels."""
        return 0 if self.batch is None else 1

    def naive(self) -> list[Tensor]:
        """Activations and gradients, channel by channel. Shape: `(num_positions, channels)`."""
        x = self.inputs().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(self.layer()(x)), x)
        return [
            torch.stack([tensor.select(self.dim, channel).flatten() for channel in range(self.channels)], -1)
            for tensor in (x.detach(), gradient)
        ]


convolutions = st.builds(
    Convolution,
    batch=st.none() | st.integers(1, 3),
    channels=st.integers(1, 4),
    space=st.lists(st.integers(3, 5), min_size=1, max_size=3).map(tuple),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    grouped=st.booleans(),
    transposed=st.booleans(),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=seeds,
)
# As many channels as columns, so that the wrong dimension has the right size.
SQUARE = Convolution(2, 4, (3, 4), 3, 1, False, False, False, torch.float32, 7)


def assert_channels_are_neurons(case: Convolution) -> None:
    layer = case.layer()
    with register_neuron_hooks(layer, reduce=None) as hooks:
        loss_of(layer(case.inputs())).backward()
    expected = torch.stack(case.naive())
    assert hooks[""].shape == expected.shape
    torch.testing.assert_close(hooks[""], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(hooks[""][0], expected[0])


@given(case=convolutions)
def test_each_channel_of_a_convolution_is_a_neuron(case: Convolution) -> None:
    assert_channels_are_neurons(case)


def test_the_law_tells_hooks_that_take_the_last_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_channels_are_neurons(SQUARE)
    monkeypatch.setattr(tap, "input_dim", lambda layer: -1)
    with pytest.raises(AssertionError):
        assert_channels_are_neurons(SQUARE)


@given(case=convolutions, name=st.sampled_from(sorted(NAIVE_SUMS)))
def test_sums_have_one_entry_per_channel(case: Convolution, name: str) -> None:
    layer = case.layer()
    with register_neuron_hooks(layer, reduce=name, accum_dtype=torch.float64) as hooks:
        loss_of(layer(case.inputs())).backward()
    expected = NAIVE_SUMS[name](*(tensor.double() for tensor in case.naive()))
    torch.testing.assert_close(hooks[""], expected, rtol=1e-4, atol=1e-3)


@given(case=convolutions.filter(lambda case: not case.grouped))
def test_silencing_a_channel_changes_a_linear_read_out_by_its_attribution(case: Convolution) -> None:
    layer, x = case.layer().double(), case.inputs().double()
    with register_neuron_hooks(layer, accum_dtype=torch.float64) as hooks:
        layer(x).sum().backward()
    with torch.no_grad():
        for channel in range(case.channels):
            silenced = x.clone()
            silenced.select(case.dim, channel).zero_()
            torch.testing.assert_close(layer(x).sum() - layer(silenced).sum(), hooks[""][channel])


@given(case=convolutions)
def test_a_mask_of_batch_and_space_says_which_positions_count(case: Convolution) -> None:
    leading = case.space if case.batch is None else (case.batch, *case.space)
    mask = torch.rand(leading, generator=generator(case.seed)) < 0.5
    layer = case.layer()
    with register_neuron_hooks(layer, reduce=None, position_mask=mask) as hooks:
        loss_of(layer(case.inputs())).backward()
    expected = torch.stack(case.naive())[:, mask.flatten()]
    torch.testing.assert_close(hooks[""], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2,), (2, 4), (2, 4, 3), (2, 4, 3, 4)])
def test_a_mask_of_another_shape_raises(shape: tuple[int, ...]) -> None:
    layer = SQUARE.layer()
    register_neuron_hooks(layer, position_mask=torch.ones(shape, dtype=torch.bool))
    message = rf"position_mask has shape \({', '.join(map(str, shape))},?\), but layer '' has positions \(2, 3, 4\)"
    with pytest.raises(NeuronHookError, match=message):
        layer(SQUARE.inputs())


def test_a_convolution_refuses_an_input_without_channels() -> None:
    layer = SQUARE.layer()
    register_neuron_hooks(layer)
    message = r"a 2-D tensor of torch.float32, expected a floating-point tensor \(..., num_neurons, size, size\)"
    with pytest.raises(NeuronHookError, match=message):
        layer(torch.ones(3, 4))


def test_a_convolution_whose_size_is_not_known_yet_is_captured() -> None:
    layer = nn.LazyConv2d(2, 3)
    with register_neuron_hooks(layer) as hooks:
        layer(SQUARE.inputs()).sum().backward()
    assert hooks[""].shape == (SQUARE.channels,)


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(1), nn.Dropout(0.0)], ids=repr)
def test_other_modules_count_the_last_dimension(layer: nn.Module) -> None:
    x = normal(5, 2, 4, 3, 6)
    with register_neuron_hooks(layer, reduce="act") as hooks:
        layer(x).sum().backward()
    assert hooks[""].shape == (6,)
    torch.testing.assert_close(hooks[""], x.sum((0, 1, 2)))


def test_kept_positions_of_images_of_any_size_follow_each_other() -> None:
    layer, sizes = nn.Conv2d(2, 3, 3), [(3, 4), (5, 5)]
    with register_neuron_hooks(layer, reduce=None) as hooks:
        for size in sizes:
            layer(torch.ones(1, 2, *size)).sum().backward()
    assert hooks[""].shape == (2, sum(map(math.prod, sizes)), 2)
