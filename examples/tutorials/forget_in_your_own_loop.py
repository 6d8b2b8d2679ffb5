"""Make a model forget facts in a training loop of your own, and see that their neighbors are still there."""

# --8<-- [start:imports]
from __future__ import annotations

from torch_simu import NeuronSelection, SIMUOptimizer, register_neuron_hooks
from torch_simu.optimizer import GradientBalance
from torch_simu.unlearning.data.batches import Batches
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction, train_base
from torch_simu.unlearning.demo.memorize import TrainConfig
from torch_simu.unlearning.metrics.generation import generate_answers
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.objectives import answer_log_probs, mean_answer_nll

# --8<-- [end:imports]

# --8<-- [start:model]
# A small model that knows fictional facts by heart; with a model of your own, load_model, load_rows and encode.
training = TrainConfig(epochs=60, lr=4e-3, batch_size=16)
recipe = DemoRecipe(num_forget=4, retain_per_forget=2, num_places=6, d_model=64, d_ff=256, training=training)
fiction = make_fiction(recipe, seed=0)
model = train_base(fiction, recipe, seed=0, sets=["forget", "retain", "world"])
# --8<-- [end:model]


# --8<-- [start:measure]
def known(name: str) -> float:
    """Return the mean probability of the answers of a set: of a token, given all before it."""
    scores = score_answers(model, fiction.examples[name])["probability"]
    return sum(scores) / len(scores)


def says(name: str) -> str:
    """Return what the model says to the first question of a set."""
    return generate_answers(model, fiction.tokenizer, fiction.examples[name][:1])[0]


before = {name: known(name) for name in ("forget", "retain", "world")}
for name in before:
    print(f"{name}: {fiction.rows[name][0].question} '{says(name)}'")
# --8<-- [end:measure]

# --8<-- [start:forget]
neurons = NeuronSelection.full(model)
optimizer = SIMUOptimizer(neurons.param_groups(model), lr=0.02, betas=(0.9, 0.8), hessian_interval=5, curvature="both")
balance = GradientBalance(optimizer)
batches = {name: Batches(fiction.examples[name], 16, seed=0) for name in ("forget", "retain")}
steps = 0
with register_neuron_hooks(model, neurons, reduce="covariance", outputs=True) as hooks:
    while known("forget") > 0.1 and steps < 200:
        hooks.reset()
        with balance.forget():
            log_probs, scored = answer_log_probs(model, batches["forget"].batch(steps))
            log_probs[scored].exp().mean().backward()
        mean_answer_nll(model, batches["retain"].batch(steps)).backward()
        if optimizer.hessian_due:
            optimizer.update_curvature(hooks)
        balance.combine_(retain_weight=2.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
# --8<-- [end:forget]

# --8<-- [start:result]
for name, probability in before.items():
    print(f"{name}: {probability:.2f} before, {known(name):.2f} after {steps} steps, '{says(name)}'")
assert min(before.values()) > 0.9
assert known("forget") <= 0.1 and says("forget") != fiction.rows["forget"][0].answer
assert known("retain") > 0.9 and says("retain") == fiction.rows["retain"][0].answer
assert known("world") > 0.8 and says("world") == fiction.rows["world"][0].answer
# --8<-- [end:result]
