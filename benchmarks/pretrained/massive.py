"""How much of a layer's activations is one neuron's, in a model that was really pretrained: what damping meets there.

Of each down projection the diagonal of the covariance of its neurons, over the positions that the answers of the
capitals to be forgotten depend on.
Usage: python -m benchmarks.pretrained.massive --work work
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.forgetting.cases import Case, pretrained_case
from benchmarks.results import RESULTS, command, environment, write_result
from benchmarks.verdicts.parts import Row
from torch_simu import register_neuron_hooks
from torch_simu.unlearning.data.batches import batches_in_order
from torch_simu.unlearning.objectives import answer_log_probs
from torch_simu.whitening import damping_scale


def rows_of(case: Case) -> Iterator[Row]:
    """Layer by layer the largest entry of the diagonal, its means with and without the largest fiftieth, its median."""
    with register_neuron_hooks(case.model, reduce="covariance") as hooks:
        for batch in batches_in_order(case.sets["forget"], case.batch_size):
            log_probs, scored = answer_log_probs(case.model, batch)
            log_probs[scored].exp().mean().backward()
            case.model.zero_grad()
    for layer, covariance in hooks.items():
        diagonal = covariance.diagonal() / hooks.num_positions(layer)
        yield {
            "layer": layer,
            "neurons": len(diagonal),
            "largest": diagonal.max().item(),
            "mean": diagonal.mean().item(),
            "trimmed": damping_scale(diagonal).item(),
            "median": diagonal.median().item(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model")
    parser.add_argument("--out", type=Path, default=RESULTS / "massive_cpu_202611.json")
    parser.add_argument("--force", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(rows_of(pretrained_case(options.work, 0)))
    content = {"command": command(), "environment": environment(), "rows": rows}
    write_result(options.out, claim="massive", force=options.force, **content)


if __name__ == "__main__":
    main()
