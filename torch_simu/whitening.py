"""The whitened step: a gradient is multiplied by inverse covariances, and moves a layer by a share of its norm."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_simu._checks import problem

_FLOOR = 1e-12
_LARGEST = 50
"""Of so many entries of a diagonal the largest does not count where its scale is asked for."""
_BLOCK = 64
"""Columns of a block of a triangular solve on a processor: a multiple of its vectors, and small beside a layer."""


def damped_cholesky(covariance: Tensor, *, damping: float) -> Tensor:
    r"""Return the lower triangular $L$ with $L L^T = C + \delta\,\overline{\operatorname{diag} C}\,I$.

    Args:
        covariance: A covariance $C$, symmetric and positive semidefinite. Shape: `(num, num)`.
        damping: $\delta > 0$, relative to the mean of the diagonal (`damping_scale`), so that the scale of activations
            does not matter.

    Raises:
        ValueError: If `covariance` is not square.

    Examples:
        >>> damped_cholesky(torch.diag(torch.tensor([3.0, 1.0])), damping=0.5)
        tensor([[2.0000, 0.0000],
                [0.0000, 1.4142]])
    """
    if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(problem(f"covariance has shape {tuple(covariance.shape)}", "a square matrix"))
    mean = damping_scale(covariance.diagonal())
    damped = covariance.clone()
    # The floor is for neurons that are silent at every position.
    damped.diagonal().add_((damping * mean).clamp(min=_FLOOR))
    # Without the check of the factor, which would wait for a GPU: damping keeps it away from zero. By rows, as formats
    # of checkpoints bring it back: the last bits of a solve depend on how it lies in memory.
    factor: Tensor = torch.linalg.cholesky_ex(damped).L.clone(memory_format=torch.contiguous_format)
    return factor


def undamped(factor: Tensor, *, damping: float) -> Tensor:
    """Return the covariance that `damped_cholesky` made a factor of.

    So an optimizer need not keep both.

    Args:
        factor: What `damped_cholesky` returned. Shape: `(num, num)`.
        damping: The same as there.

    Examples:
        >>> undamped(damped_cholesky(torch.eye(2), damping=0.5), damping=0.5)
        tensor([[1., 0.],
                [0., 1.]])
    """
    covariance = factor @ factor.T
    # Adding a constant to all entries leaves their order as it is, and so which of them count.
    mean = damping_scale(covariance.diagonal())
    covariance.diagonal().sub_(mean * damping / (1 + damping))
    return covariance


def damping_scale(diagonal: Tensor) -> Tensor:
    """Return what damping is relative to: the mean of a diagonal without its largest fiftieth, rounded down.

    Pretrained models have layers in which one neuron is a thousand times as active as the others at the first position
    (massive activations, Sun et al. 2024, arXiv 2402.17762). Damped by a mean that is that neuron's alone, the
    covariance of all others would be lost.

    Args:
        diagonal: Shape: `(num,)`.

    Examples:
        >>> damping_scale(torch.tensor([1.0] * 49 + [1e6]))
        tensor(1.)
    """
    counted = len(diagonal) - len(diagonal) // _LARGEST
    mean: Tensor = diagonal.topk(counted, largest=False, sorted=False).values.mean()
    return mean


def whiten(grad: Tensor, neuron_factor: Tensor | None, output_factor: Tensor | None = None) -> Tensor:
    r"""Return $D^{-1} G A^{-1}$, from the Cholesky factors of both covariances.

    $A$ is the covariance of the neurons' activations and $D$ that of the gradients of the layer's outputs: together
    the Kronecker-factored curvature of a linear layer (Martens and Grosse 2015, arXiv 1503.05671). Over the forget set
    the inverse takes out of a step the directions that all its rows share, which an attacker's gradient takes, too.

    Args:
        grad: Gradient $G$. Shape: `(d_model, num_selected)`.
        neuron_factor: Factor of $A$; None: the identity. Shape: `(num_selected, num_selected)`.
        output_factor: Factor of $D$; None: the identity. Shape: `(d_model, d_model)`.

    Raises:
        ValueError: If a factor does not fit.

    Examples:
        >>> whiten(torch.tensor([[4.0, 1.0]]), torch.diag(torch.tensor([2.0, 1.0])))
        tensor([[1., 1.]])
    """
    for name, factor, size in (("neuron_factor", neuron_factor, grad.shape[1]), ("output_factor", output_factor, None)):
        size = grad.shape[0] if size is None else size
        if factor is not None and factor.shape != (size, size):
            raise ValueError(problem(f"{name} has shape {tuple(factor.shape)}", f"{(size, size)}"))
    # The outputs first: their solve takes a gradient by rows as it lies, and returns it so.
    if output_factor is not None:
        grad = _solved(grad.mT, output_factor).mT
    return grad if neuron_factor is None else _solved(grad, neuron_factor)


def _solved(matrix: Tensor, factor: Tensor) -> Tensor:
    """Return the solution $X$ of $X L L^T = M$."""
    if matrix.device.type != "cpu":
        half = torch.linalg.solve_triangular(factor.mT, matrix, upper=True, left=False)
        solution: Tensor = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
        return solution
    # Substitution by blocks, whose diagonal ones alone are inverted: products that take matrices as they lie. On a
    # processor the solvers of torch make transposed copies, and take two to three times as long.
    starts = range(0, len(factor), _BLOCK)
    blocks = [slice(start, min(start + _BLOCK, len(factor))) for start in starts]
    eye = torch.eye(min(_BLOCK, len(factor)), dtype=factor.dtype)
    inverses = []
    for block in blocks:
        own = factor[block, block]
        inverses.append(torch.linalg.solve_triangular(own, eye[: len(own), : len(own)], upper=False))
    # What it holds is multiplied by beta=0, which makes nothing of it, whatever it is.
    result = torch.empty_like(matrix)
    for block, inverse in zip(blocks, inverses, strict=True):
        before, rest = slice(0, block.start), matrix[:, block]
        if block.start:
            rest = torch.addmm(rest, result[:, before], factor[block, before].mT, alpha=-1)
        result[:, block].addmm_(rest, inverse.mT, beta=0)
    for block, inverse in zip(reversed(blocks), reversed(inverses), strict=True):
        behind = slice(block.stop, None)
        rest = torch.addmm(result[:, block], result[:, behind], factor[behind, block], alpha=-1)
        result[:, block].addmm_(rest, inverse, beta=0)
    return result


def trust_step_(
    weight: Tensor,
    direction: Tensor,
    exp_avg: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    direction_norm: Tensor,
    weight_norm: Tensor,
    weight_decay: float = 0.0,
) -> None:
    r"""Move selected weights by a share of their norm, in place.

    $$m \leftarrow \beta_1 m + (1 - \beta_1) \frac{g}{\lVert g \rVert}, \qquad
      w \leftarrow w (1 - \eta\lambda) - \eta\,\lVert w \rVert\, m$$

    Apart from the decay no step is longer than $\eta\,\lVert w \rVert$; it is shorter where directions disagree.

    Args:
        weight: Selected weights $w$, changed in place. Shape: `(d_model, num_selected)`.
        direction: Whitened gradient $g$. Shape: as `weight`.
        exp_avg: Momentum $m$, without a unit, changed in place. Shape: as `weight`.
        lr: Step size $\eta$: the largest step as a share of the norm of the weights.
        beta1: Decay of the momentum.
        direction_norm: $\lVert g \rVert$, over all shards; a direction of zero stays zero.
        weight_norm: $\lVert w \rVert$, over all shards.
        weight_decay: Decoupled decay $\lambda$.

    Raises:
        ValueError: If `direction` or `exp_avg` has another shape than `weight`.

    Examples:
        >>> weight, zero, norm = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), torch.tensor(5.0)
        >>> direction = torch.tensor([[0.0, 2.0]])
        >>> trust_step_(weight, direction, zero, lr=0.1, beta1=0.0, direction_norm=torch.tensor(2.0), weight_norm=norm)
        >>> weight
        tensor([[3.0000, 3.5000]])
    """
    for name, tensor in (("direction", direction), ("exp_avg", exp_avg)):
        if tensor.shape != weight.shape:
            raise ValueError(problem(f"{name} has shape {tuple(tensor.shape)}", f"{tuple(weight.shape)} as weight"))
    update = trust_update_(
        direction, exp_avg, lr=lr, beta1=beta1, direction_norm=direction_norm, weight_norm=weight_norm
    )
    if weight_decay != 0:
        weight.mul_(1 - lr * weight_decay)
    weight.sub_(update)


def trust_update_(
    direction: Tensor,
    exp_avg: Tensor,
    *,
    lr: float | Tensor,
    beta1: float,
    direction_norm: Tensor,
    weight_norm: Tensor,
) -> Tensor:
    r"""Advance the momentum in place and return what a trust step without decay subtracts from the weights.

    Args:
        direction: Whitened gradient $g$.
        exp_avg: Momentum $m$, changed in place. Shape: as `direction`.
        lr: Step size $\eta$; negated, it gives what is to be added.
        beta1: Decay of the momentum.
        direction_norm: $\lVert g \rVert$.
        weight_norm: $\lVert w \rVert$.

    Examples:
        >>> zero, norms = torch.zeros(1, 2), {"direction_norm": torch.tensor(2.0), "weight_norm": torch.tensor(5.0)}
        >>> trust_update_(torch.tensor([[0.0, 2.0]]), zero, lr=0.1, beta1=0.0, **norms)
        tensor([[0.0000, 0.5000]])
    """
    tiny = torch.finfo(direction.dtype).tiny
    unit = direction / direction_norm.clamp(min=tiny)
    exp_avg.lerp_(unit, 1 - beta1)
    return torch.mul(exp_avg, lr * weight_norm, out=unit)
