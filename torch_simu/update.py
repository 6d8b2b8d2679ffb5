"""The clipped diagonal Newton step: a pure function of compact tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_simu._checks import problem


def clipped_step_(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    hessian: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    rho: float,
    eps: float = 1e-12,
    weight_decay: float = 0.0,
    clip: float = 1.0,
) -> None:
    r"""Move selected weights by one clipped diagonal Newton step, in place.

    $$m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
      w \leftarrow w (1 - \eta\lambda) - \eta \operatorname{clip}\left(\frac{m}{\max(\rho h, \epsilon)}, -c, c\right)$$

    Apart from the decay no entry moves farther than $\eta c$ (Liu et al. 2023, Sophia, Algorithm 3, with the batch
    factor folded into $h$). All tensors have the same shape, usually `(d_model, num_selected)`.

    Args:
        weight: Selected weights $w$, changed in place.
        grad: Gradient $g$, in loss per unit of weight.
        exp_avg: Momentum $m$, as `grad`, changed in place.
        hessian: Curvature $h \ge 0$, in loss per squared unit of weight.
        lr: Step size $\eta$: the largest change of one entry when $c = 1$.
        beta1: Decay of the momentum.
        rho: Curvature scale $\rho$: larger clips less.
        eps: Floor of the denominator.
        weight_decay: Decoupled decay $\lambda$ of the selected weights.
        clip: Bound $c$ of the ratio.

    Raises:
        ValueError: If `grad`, `exp_avg` or `hessian` has another shape than `weight`.

    Examples:
        >>> weight, zero = torch.zeros(1, 2), torch.zeros(1, 2)
        >>> clipped_step_(weight, torch.tensor([[1.0, -0.5]]), zero, torch.ones(1, 2), lr=0.1, beta1=0.0, rho=1.0)
        >>> weight
        tensor([[-0.1000,  0.0500]])
    """
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("hessian", hessian)):
        if tensor.shape != weight.shape:
            raise ValueError(problem(f"{name} has shape {tuple(tensor.shape)}", f"{tuple(weight.shape)} as weight"))
    if weight_decay != 0:
        weight.mul_(1 - lr * weight_decay)
    weight.sub_(clipped_update_(grad, exp_avg, hessian, lr=lr, beta1=beta1, rho=rho, eps=eps, clip=clip))


def clipped_update_(
    grad: Tensor,
    exp_avg: Tensor,
    hessian: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    rho: float,
    eps: float = 1e-12,
    clip: float = 1.0,
) -> Tensor:
    r"""Advance the momentum in place and return what a clipped step without decay subtracts from the weights.

    Args:
        grad: Gradient $g$.
        exp_avg: Momentum $m$, changed in place.
        hessian: Curvature $h$. All three have the shape of the weights.
        lr: Step size $\eta$; negated, it gives what is to be added.
        beta1: Decay of the momentum.
        rho: Curvature scale.
        eps: Floor of the denominator.
        clip: Bound of the ratio.

    Examples:
        >>> zero = torch.zeros(2)
        >>> clipped_update_(torch.tensor([1.0, -0.5]), zero, torch.ones(2), lr=0.1, beta1=0.0, rho=1.0)
        tensor([ 0.1000, -0.0500])
    """
    exp_avg.lerp_(grad, 1 - beta1)
    floor = (rho * hessian).clamp_(min=eps)
    return torch.div(exp_avg, floor, out=floor).clamp_(-clip, clip).mul_(lr)


def clipped_step_foreach_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    rho: float,
    eps: float = 1e-12,
    weight_decay: float = 0.0,
    clip: float = 1.0,
) -> None:
    """Do `clipped_step_` on lists of tensors with a few fused kernels; bit for bit the same result.

    Args:
        weights: Selected weights of each parameter, all on one device and of one dtype, changed in place.
        grads: Gradients, aligned with `weights`. Shape of each, as of momenta and curvatures: as its weight.
        exp_avgs: Momenta, aligned, changed in place.
        hessians: Curvatures, aligned.
        lr: As in `clipped_step_`, like the arguments that follow.
        beta1: Decay of the momentum.
        rho: Curvature scale.
        eps: Floor of the denominator.
        weight_decay: Decoupled decay.
        clip: Bound of the ratio.

    Examples:
        >>> weights = [torch.zeros(2)]
        >>> one = [torch.ones(2)]
        >>> clipped_step_foreach_(weights, one, [torch.zeros(2)], one, lr=0.1, beta1=0.5, rho=1.0)
        >>> weights[0]
        tensor([-0.0500, -0.0500])
    """
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    floors = torch._foreach_mul(hessians, rho)
    torch._foreach_clamp_min_(floors, eps)
    ratios = torch._foreach_div(exp_avgs, floors)
    torch._foreach_clamp_min_(ratios, -clip)
    torch._foreach_clamp_max_(ratios, clip)
    torch._foreach_mul_(ratios, _like(lr, ratios[0]))
    if weight_decay != 0:
        torch._foreach_mul_(weights, _like(1 - lr * weight_decay, weights[0]))
    torch._foreach_sub_(weights, ratios)


def unclipped_share(exp_avg: Tensor, hessian: Tensor, *, rho: float, eps: float = 1e-12, clip: float = 1.0) -> Tensor:
    """Return the share of entries whose step is not clipped, as a scalar in [0, 1] (NaN when there is none).

    Args:
        exp_avg: Momentum.
        hessian: Curvature. Shape: as `exp_avg`.
        rho: Curvature scale.
        eps: Floor of the denominator.
        clip: Bound of the ratio.

    Examples:
        >>> unclipped_share(torch.tensor([0.5, 2.0]), torch.ones(2), rho=1.0)
        tensor(0.5000)
    """
    return (exp_avg.abs() < clip * (rho * hessian).clamp(min=eps)).float().mean()


def round_stochastically(value: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Round float32 to a shorter float so that the expected value is kept.

    A step far below the spacing of bfloat16 is lost by rounding to nearest and kept on average by this.

    Args:
        value: A float32 tensor. Shape: any.
        dtype: `torch.bfloat16`, or `torch.float16`.
        generator: Source of randomness, on the device of `value`.

    Raises:
        ValueError: If `dtype` is another type.

    Examples:
        >>> round_stochastically(torch.ones(2), torch.bfloat16, torch.Generator().manual_seed(0))
        tensor([1., 1.], dtype=torch.bfloat16)
    """
    return round_by(value, dtype, torch.rand(value.shape, generator=generator, device=value.device))


def round_by(value: Tensor, dtype: torch.dtype, draw: Tensor) -> Tensor:
    """Round float32 to a shorter float, away from the nearest one where `draw` is below the chance of that.

    Args:
        value: A float32 tensor.
        dtype: `torch.bfloat16`, or `torch.float16`.
        draw: Uniform in [0, 1). Shape: as `value`.

    Raises:
        ValueError: If `dtype` is another type.

    Examples:
        >>> round_by(torch.tensor([1.0, 1.0039]), torch.bfloat16, torch.zeros(2))
        tensor([1.0000, 1.0078], dtype=torch.bfloat16)
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(problem(f"dtype is {dtype}", "torch.bfloat16 or torch.float16"))
    nearest = value.to(dtype)
    # The other neighbor lies on the far side of the value; where the value is representable there is none.
    error = value - nearest.float()
    toward = torch.where(error > 0, torch.inf, -torch.inf).to(dtype)
    other = torch.nextafter(nearest, toward) if dtype == torch.bfloat16 else _next_half(nearest, toward)
    chance = (error / (other.float() - nearest.float())).nan_to_num(0.0)
    return torch.where(draw < chance, other, nearest)


def counted_uniform(shape: Sequence[int], seed: Tensor) -> Tensor:
    """Return float32 numbers in [0, 1) that a seed on the device determines, without a generator.

    Args:
        shape: Their shape.
        seed: An int64 scalar; each seed gives other numbers.

    Examples:
        >>> counted_uniform((3,), torch.tensor(7)).shape
        torch.Size([3])
    """
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.int64, device=seed.device).reshape(shape)
    key = _mixed(seed)
    # Twice, because the numbers of two seeds are the same ones in another order after the first time.
    return (_mixed(_mixed(index + key) + seed) >> 8).to(torch.float32) * 2.0**-24


def _mixed(value: Tensor) -> Tensor:
    """Return 32 bits whose every bit depends on all of those of `value` (Mueller's integer hash)."""
    value = value & 0xFFFFFFFF
    for _ in range(2):
        value = (((value >> 16) ^ value) * 0x045D9F3B) & 0xFFFFFFFF
    return (value >> 16) ^ value


def _like(factor: float | Tensor, tensor: Tensor) -> float | Tensor:
    # Fused kernels take a scalar tensor of their own dtype only.
    return factor.to(tensor.dtype) if isinstance(factor, Tensor) else factor


def _next_half(value: Tensor, toward: Tensor) -> Tensor:
    # torch.nextafter has no float16 kernel: step the bit pattern, whose order is that of the magnitudes.
    bits = value.view(torch.int16)
    grows = (toward > 0) == (value >= 0)
    stepped = torch.where(grows, bits + 1, bits - 1).view(torch.float16)
    smallest = torch.where(toward > 0, 1, -(2**15) + 1).to(torch.int16).view(torch.float16)
    return torch.where(value == 0, smallest, stepped)
