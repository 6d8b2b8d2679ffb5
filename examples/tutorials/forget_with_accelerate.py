"""Make a model forget in a loop of accelerate, in micro-batches."""

# --8<-- [start:imports]
from __future__ import annotations

from accelerate import Accelerator
from torch.utils.data import DataLoader

from torch_simu import NeuronSelection, SIMUOptimizer
from torch_simu.unlearning.data.pairs import ForgetRetainPairs, PairCollator
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction, train_base
from torch_simu.unlearning.demo.memorize import TrainConfig
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.objectives import Probability
from torch_simu.unlearning.trainer.gradients import StepGradients

# --8<-- [end:imports]

# --8<-- [start:model]
training = TrainConfig(epochs=60, lr=4e-3, batch_size=16)
recipe = DemoRecipe(num_forget=4, retain_per_forget=2, num_places=6, d_model=64, d_ff=256, training=training)
fiction = make_fiction(recipe, seed=0)
model = train_base(fiction, recipe, seed=0, sets=["forget", "retain", "world"])


def known(name: str) -> float:
    """Return the mean probability of the answers of a set."""
    scores = score_answers(model, fiction.examples[name])["probability"]
    return sum(scores) / len(scores)


before = {name: known(name) for name in ("forget", "retain", "world")}
# --8<-- [end:model]

# --8<-- [start:prepare]
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
selection = NeuronSelection.full(model)
optimizer = SIMUOptimizer(
    selection.param_groups(model), lr=0.02, betas=(0.9, 0.8), hessian_interval=5, curvature="both"
)
pairs = ForgetRetainPairs(fiction.examples["forget"], fiction.examples["retain"], num_pairs=16 * 200)
loader = DataLoader(pairs, batch_size=8, collate_fn=PairCollator())
prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
# --8<-- [end:prepare]

# --8<-- [start:loop]
objective = Probability(retain_weight=2.0)
with StepGradients(prepared, optimizer, balance=True) as gradients:
    for batch in loader:
        with accelerator.accumulate(prepared):
            terms = objective.terms(prepared, batch["forget"], batch["retain"])
            gradients.add(terms, backward=accelerator.backward, last=accelerator.sync_gradients)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and known("forget") <= 0.1:
            break
# --8<-- [end:loop]

# --8<-- [start:result]
steps = optimizer.param_groups[0]["num_steps"]
for name, probability in before.items():
    print(f"{name}: {probability:.2f} before, {known(name):.2f} after {steps} steps of two micro-batches")
assert min(before.values()) > 0.9
assert known("forget") <= 0.1
assert known("retain") > 0.9
# --8<-- [end:result]
