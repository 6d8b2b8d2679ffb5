"""Time steps and refreshes of the whitened curvatures beside those of the diagonal, and the ways to solve a step.

All kinds go over the same weights and gradients, and take turns, so that what else the machine does meets all of them.
Time on the clock and of the processor are both kept: the second does not count what other programs take.
A balanced step, which brings a forget gradient to the norm of a retain gradient before, is timed as it is and where it
whitens their sum anew instead of adding up what was whitened. Refreshes are timed from what hooks recorded of 512
positions; capturing them is timed beside. Their share of 100 steps
is at the optimizer's own interval of 10 steps.
The ways to solve one layer's step are compared by time, and by their error beside float64: of the solution, and of what
it gives when it is multiplied back (the residual, relative to the sizes of solution and covariance).
Usage: python -m benchmarks.optimizer.whitened [--repeats 40] [--threads 1]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.optimizer.peers import Problem, Size, state_bytes
from benchmarks.results import RESULTS, command, environment, write_result
from torch_simu import NeuronSelection, SIMUOptimizer, register_neuron_hooks
from torch_simu.hooks import NeuronHooks
from torch_simu.optimizer import GradientBalance
from torch_simu.whitening import damped_cholesky, whiten

D_MODEL, D_FF, POSITIONS, INTERVAL = 1024, 4096, 512, 10
LAYERS = {0.05: 24, 0.1: 24, 0.3: 4, 1.0: 1}
"""Share of the neurons -> how many layers, so that large shares fit beside others on a small machine."""

CURVATURES = {"diagonal": "gnb", "neurons": "neurons", "both": "both"}
Timed = Callable[[], object]


def turns(timed: Mapping[str, Timed], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each, taking turns, on the clock and of the processor, after one round that warms up."""
    found = {name: {"milliseconds": [], "processor_milliseconds": []} for name in timed}
    for repeat in range(repeats + 1):
        for name, call in timed.items():
            clock, processor = time.perf_counter(), time.thread_time()
            call()
            passed = time.perf_counter() - clock, time.thread_time() - processor
            if repeat:
                for key, value in zip(found[name], passed, strict=True):
                    found[name][key].append(round(1e3 * value, 4))
    return found


def hooks_of(problem: Problem, fraction: float) -> NeuronHooks:
    """Hooks that recorded a batch on layers with the weights of a problem, whose gradients stay as they are."""
    layers = nn.ModuleDict()
    for number, weight in enumerate(problem.weights):
        layers[str(number)] = nn.Linear(D_FF, D_MODEL, bias=False, device="meta")
        layers[str(number)].weight = weight
    chosen = {str(number): each.tolist() for number, each in enumerate(problem.chosen)}
    selection = NeuronSelection(chosen, dict.fromkeys(chosen, D_FF))
    hooks = register_neuron_hooks(layers, selection, reduce="covariance", outputs=True)
    draw = torch.Generator().manual_seed(1)
    kept = [weight.grad for weight in problem.weights]
    for layer in layers.values():
        layer.weight.grad = None
        inputs = torch.randn(POSITIONS, D_FF, generator=draw) + 0.5
        layer(inputs).square().sum().backward()
    for weight, grad in zip(problem.weights, kept, strict=True):
        weight.grad = grad
    hooks.remove()
    return hooks


def balanced_step(optimizer: SIMUOptimizer, *, anew: bool) -> Timed:
    """A step of two gradients that are brought to one norm, each that of the weights' `.grad`."""
    balance = GradientBalance(optimizer)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    kept = [weight.grad for weight in weights]

    def step() -> None:
        with balance.forget():
            for weight, grad in zip(weights, kept, strict=True):
                weight.grad = grad
        for weight, grad in zip(weights, kept, strict=True):
            weight.grad = grad.clone()
        balance.combine_(retain_weight=2.0)
        if anew:
            optimizer._directions.clear()
        optimizer.step()
        for weight, grad in zip(weights, kept, strict=True):
            weight.grad = grad

    return step


def measured(fraction: float, repeats: int) -> Iterator[dict[str, object]]:
    """Rows of steps, refreshes and state at one share of the neurons."""
    layers = LAYERS[fraction]
    common = {"fraction": fraction, "layers": layers, "d_model": D_MODEL, "d_ff": D_FF}
    problem = Problem(Size(D_MODEL, D_FF, layers, layers), layers, fraction, "cpu", torch.float32)
    hooks = hooks_of(problem, fraction)
    group = {"params": problem.weights, "neurons": problem.neurons()}
    optimizers = {
        name: SIMUOptimizer([dict(group)], lr=1e-6, hessian_interval=INTERVAL, curvature=curvature)
        for name, curvature in CURVATURES.items()
    }
    refreshes: dict[str, Timed] = {
        name: (lambda each=each: each.update_hessian(1000))
        if name == "diagonal"
        else (lambda each=each: each.update_curvature(hooks))
        for name, each in optimizers.items()
    }
    for refresh in refreshes.values():
        refresh()
    steps = {name: each.step for name, each in optimizers.items()}
    few = max(3, repeats // 4)
    for what, timed, times in (("step", steps, repeats if fraction == 0.05 else few), ("refresh", refreshes, few)):
        for name, found in turns(timed, times).items():
            yield {"what": what, **common, "curvature": name, **found}
    balanced = {
        f"{name}{', the sum anew' if anew else ''}": balanced_step(each, anew=anew)
        for name, each in optimizers.items()
        if name != "diagonal"
        for anew in (False, True)
    }
    for name, found in turns(balanced, few).items():
        yield {"what": "balanced step", **common, "curvature": name, **found}
    activation, gradient = torch.randn(POSITIONS, D_FF), torch.randn(POSITIONS, D_MODEL)
    sides = {
        "neurons": [(record, activation) for record in hooks._records.values()],
        "both": [(record, activation) for record in hooks._records.values()]
        + [(record, gradient) for record in hooks._outputs.values()],
    }
    captures = {
        name: (lambda pairs=pairs: [record.add(0, seen, seen) for record, seen in pairs])
        for name, pairs in sides.items()
    }
    for name, found in turns(captures, few).items():
        yield {"what": "capture", **common, "positions": POSITIONS, "curvature": name, **found}
    for name, optimizer in optimizers.items():
        yield {"what": "state", **common, "curvature": name, "bytes": state_bytes(optimizer)}


def solves(fraction: float, repeats: int) -> Iterator[dict[str, object]]:
    """Rows of the ways to multiply a gradient by the inverse of one layer's covariance."""
    count, draw = round(fraction * D_FF), torch.Generator().manual_seed(2)
    grad = torch.randn(D_MODEL, count, generator=draw)
    seen = torch.randn(POSITIONS, count, generator=draw) + 0.5
    covariance = seen.T @ seen / POSITIONS
    solve = torch.linalg.solve_triangular
    for damping in (0.1, 1e-4):
        factor = damped_cholesky(covariance, damping=damping)
        inverse = torch.cholesky_inverse(factor)
        ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "by blocks from the right (ours)": whiten,
            "torch.cholesky_solve": lambda grad, factor: torch.cholesky_solve(grad.T, factor).T,
            "triangular from the left": lambda grad, factor: (
                solve(factor.T, solve(factor, grad.T, upper=False), upper=True).T
            ),
            "triangular from the right": lambda grad, factor: solve(
                factor, solve(factor.mT, grad, upper=True, left=False), upper=False, left=False
            ).contiguous(),
            "product with an explicit inverse": lambda grad, factor, inverse=inverse: grad @ inverse,
        }
        wide = (factor.double() @ factor.double().T, grad.double())
        exact = torch.linalg.solve(wide[0], wide[1], left=False)
        timed = {name: (lambda way=way, factor=factor: way(grad, factor)) for name, way in ways.items()}
        for name, found in turns(timed, repeats).items():
            solution = ways[name](grad, factor).double()
            residual = (solution @ wide[0] - wide[1]).norm() / (solution.norm() * torch.linalg.matrix_norm(wide[0], 2))
            yield {
                "what": "solve",
                "fraction": fraction,
                "damping": damping,
                "condition": torch.linalg.cond(wide[0]).item(),
                "way": name,
                "relative_error": ((solution - exact).norm() / exact.norm()).item(),
                "residual": residual.item(),
                **found,
            }


def shares(rows: list[dict[str, object]]) -> Iterator[dict[str, object]]:
    """Rows of best times over those of the diagonal, and of what refreshes add to 100 steps; of the processor."""
    best = {
        (row["what"], row["fraction"], row["curvature"]): min(row["processor_milliseconds"])
        for row in rows
        if row["what"] in ("step", "refresh", "capture")
    }
    for (what, fraction, name), step in best.items():
        if what != "step":
            continue
        refresh = best["refresh", fraction, name] + best.get(("capture", fraction, name), 0.0)
        yield {
            "fraction": fraction,
            "curvature": name,
            "step_over_diagonal": step / best["step", fraction, "diagonal"],
            "refreshes_in_100_steps_over_steps": refresh * (100 / INTERVAL) / (100 * step),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="replace an older result file")
    parser.add_argument("--out", type=Path, default=RESULTS / "optimizer_whitened_cpu_202611.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    for fraction in LAYERS:
        rows += measured(fraction, options.repeats)
        sys.stderr.write(f"{fraction:.0%} of the neurons: {list(shares(rows))[-3:]}\n")
    for fraction in (0.05, 0.3):
        rows += solves(fraction, options.repeats)
    write_result(
        options.out,
        force=options.force,
        claim="optimizer_whitened",
        command=command(),
        environment=environment(),
        seeds=[0, 1, 2],
        rows=rows,
        ratios=list(shares(rows)),
    )


if __name__ == "__main__":
    main()
