"""Make a model forget in two processes that each hold half of it (FSDP2)."""

# --8<-- [start:imports]
from __future__ import annotations

import os
import subprocess
import sys

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torch_simu import NeuronSelection, SIMUOptimizer
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction, train_base
from torch_simu.unlearning.demo.memorize import TrainConfig
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.objectives import Probability
from torch_simu.unlearning.trainer.gradients import StepGradients

# --8<-- [end:imports]


# --8<-- [start:shard]
def main() -> None:
    """Forget as one of two processes."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    # Every process has the same weights; a large model is loaded on the meta device, and shards are read.
    training = TrainConfig(epochs=60, lr=4e-3, batch_size=16)
    recipe = DemoRecipe(num_forget=3, retain_per_forget=2, num_places=3, d_model=64, d_ff=256, training=training)
    fiction = make_fiction(recipe, seed=0)
    model = train_base(fiction, recipe, seed=0, sets=["forget", "retain", "world"])
    own = NeuronSelection.random(model, 0.5, torch.Generator().manual_seed(rank))
    selection = NeuronSelection.broadcast(own)  # of process 0, in all
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # --8<-- [end:shard]

    # --8<-- [start:loop]
    def known(name: str) -> float:
        """Return the mean probability of the answers of a set; all processes must ask."""
        scores = score_answers(model, fiction.examples[name])["probability"]
        return sum(scores) / len(scores)

    before = {name: known(name) for name in ("forget", "retain", "world")}
    groups = selection.param_groups(model)
    optimizer = SIMUOptimizer(groups, lr=0.04, betas=(0.9, 0.8), hessian_interval=5, curvature="both")
    # Each process draws rows of its own.
    forget, retain = (Batches(fiction.examples[name], 8, seed=rank) for name in ("forget", "retain"))
    objective, steps = Probability(retain_weight=2.0), 0
    with StepGradients(model, optimizer, balance=True) as gradients:
        while steps % 5 or (known("forget") > 0.1 and steps < 200):
            gradients.add(objective.terms(model, forget.batch(steps), retain.batch(steps)))
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    # --8<-- [end:loop]

    # --8<-- [start:result]
    after = {name: known(name) for name in before}
    weight = model.model.layers[0].mlp.down_proj.weight
    held = [weight.to_local().shape, optimizer.state[weight]["exp_avg"].to_local().shape]
    if rank == 0:
        for name in before:
            print(f"{name}: {before[name]:.2f} before, {after[name]:.2f} after {steps} steps")
        print(f"weight {tuple(weight.shape)}: a process holds {tuple(held[0])} of it, and momentum {tuple(held[1])}")
    assert min(before.values()) > 0.9
    assert after["forget"] <= 0.1
    assert after["retain"] > 0.9
    distributed.barrier()
    distributed.destroy_process_group()
    # Threads of gloo outlive their group, and can abort an interpreter that shuts down: it is left at once.
    sys.stdout.flush()
    os._exit(0)
    # --8<-- [end:result]


# --8<-- [start:start]
if __name__ == "__main__" and "RANK" in os.environ:
    main()
elif __name__ == "__main__":
    # By hand: torchrun --standalone --nproc-per-node=2 forget_with_fsdp2.py
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    subprocess.run(launch, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
# --8<-- [end:start]
