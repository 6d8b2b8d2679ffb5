"""Gauss-Newton-Bartlett curvature: the loss to differentiate, and the diagonal it gives. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from torch_simu._checks import problem

IGNORED = -100
"""The label of a position that is not scored."""


def scored_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits that predict a scored label, and those labels.

    Args:
        logits: Next-token logits. Shape: `(batch, tokens, vocabulary)`; or `(positions, vocabulary)`, already aligned.
        labels: Token ids, -100 where not scored; `labels[:, t]` is predicted by `logits[:, t - 1]`, as in
            transformers. Shape: `(batch, tokens)`; or `(positions,)` for 2-D logits.

    Returns:
        Logits of shape `(num_tokens, vocabulary)` and labels of shape `(num_tokens,)`.

    Raises:
        ValueError: If the shapes do not match, or no position is scored.
    """
    if labels.shape != logits.shape[:-1] or logits.dim() not in (2, 3):
        wrong = f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}"
        raise ValueError(problem(wrong, "(batch, tokens, vocabulary) and (batch, tokens)"))
    if logits.dim() == 3:
        logits = rearrange(logits[:, :-1], "batch token vocabulary -> (batch token) vocabulary")
        labels = rearrange(labels[:, 1:], "batch token -> (batch token)")
    labels = labels.to(logits.device)
    scored = labels != IGNORED
    logits, labels = logits[scored], labels[scored]
    if labels.numel() == 0:
        raise ValueError(problem("Every label is -100", "at least one scored position"))
    return logits, labels


def gauss_newton_loss(
    logits: Tensor, labels: Tensor, *, generator: torch.Generator | None = None
) -> tuple[Tensor, int]:
    r"""Return the mean cross-entropy on labels *sampled from the model*, and the number of positions.

    With $\hat g$ the gradient of this loss over $B$ positions, $B\,\hat g^2$ is an unbiased estimate of the diagonal of
    the Gauss-Newton matrix (Liu et al. 2023, Sophia, Algorithm 2). The true labels only say which positions count.

    Args:
        logits: Next-token logits. Shape: `(batch, tokens, vocabulary)`, or `(positions, vocabulary)`.
        labels: As in transformers: -100 where not scored, shifted inside. Shape: `(batch, tokens)`, or `(positions,)`.
        generator: Source of randomness, on the device of `logits`.

    Returns:
        The loss, in nats per token, and `num_tokens`, the number $B$ of scored positions: pass it to
        `SIMUOptimizer.update_hessian`.

    Raises:
        ValueError: If the shapes do not match, or no position is scored.

    Examples:
        >>> logits = torch.zeros(1, 3, 5, requires_grad=True)
        >>> loss, num_tokens = gauss_newton_loss(logits, torch.tensor([[-100, 2, 4]]))
        >>> num_tokens, round(loss.item(), 4)
        (2, 1.6094)
    """
    logits, labels = scored_logits(logits, labels)
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    with torch.no_grad():
        probabilities = functional.softmax(logits, dim=-1)
        sampled = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    return functional.cross_entropy(logits, sampled), labels.numel()


def bartlett_diagonal(grad: Tensor, num_tokens: int) -> Tensor:
    r"""Return the Gauss-Newton diagonal $B\,\hat g^2$ from the gradient of `gauss_newton_loss`.

    Args:
        grad: Gradient of the mean loss, in loss per unit of weight. Any shape.
        num_tokens: Number $B$ of positions behind the mean.

    Examples:
        >>> bartlett_diagonal(torch.tensor([0.5, -1.0]), 4)
        tensor([1., 4.])
    """
    return grad.square() * num_tokens


def hutchinson_estimates(
    loss: Tensor,
    params: Sequence[Tensor],
    gather: Callable[[Sequence[Tensor]], list[Tensor]],
    *,
    generator: torch.Generator | None = None,
    num_probes: int = 1,
) -> Iterator[list[Tensor]]:
    r"""Yield estimates $u \odot (H u)$ of the diagonal of a Hessian, with $u$ of random signs.

    Each is unbiased (Hutchinson 1989); their mean varies less. Entries that are not gathered are not probed, so that
    they add no noise.

    Args:
        loss: A scalar whose graph is whole; it is used up.
        params: What to differentiate by.
        gather: From tensors shaped like `params` to their entries of interest.
        generator: Source of the signs, on the device of `params`.
        num_probes: How many estimates.

    Yields:
        Tensors aligned with what `gather` returns, in loss per squared unit of weight.

    Raises:
        RuntimeError: If the loss cannot be differentiated twice.

    Examples:
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> [estimate] = hutchinson_estimates((weight**3).sum(), [weight], list)
        >>> estimate[0]
        tensor([ 6., 12.])
    """
    try:
        grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
        compact = gather(grads)
        for number in range(num_probes):
            signs = [
                torch.randint(0, 2, each.shape, generator=generator, device=each.device).mul_(2).sub_(1).to(each.dtype)
                for each in compact
            ]
            product = torch.stack([(sign * each).sum() for sign, each in zip(signs, compact, strict=True)]).sum()
            if _has_dead_end(product):
                raise RuntimeError("an operation defines its first derivative only")
            more = number + 1 < num_probes
            # A loss that is linear in the entries has no second derivative to ask for.
            products = (
                torch.autograd.grad(product, params, retain_graph=more, materialize_grads=True)
                if product.requires_grad
                else [torch.zeros_like(param) for param in params]
            )
            yield [(sign * each).detach() for sign, each in zip(signs, gather(products), strict=True)]
    except RuntimeError as error:
        wrong = f"The loss cannot be differentiated twice ({str(error).splitlines()[0]})"
        advice = 'Load the model with attn_implementation="eager", or use gauss_newton_loss.'
        raise RuntimeError(problem(wrong, "operations with second derivatives", advice)) from error


def _has_dead_end(tensor: Tensor) -> bool:
    """Say whether a graph ends in a node that stands for a missing derivative, which autograd may take for zero."""
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ in ("Error", "DelayedError", "NotImplemented"):
            return True
        todo.extend(following for following, _ in node.next_functions)
    return False
