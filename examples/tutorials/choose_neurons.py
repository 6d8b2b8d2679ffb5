"""Find the neurons that a forget set rests on, draw them, and silence them to see whether they are the right ones."""

# --8<-- [start:imports]
from __future__ import annotations

import copy

import torch

from torch_simu import NeuronSelection, attribute_neurons
from torch_simu.unlearning.data.batches import batches_in_order
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction, train_base
from torch_simu.unlearning.demo.memorize import TrainConfig
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.report.plots import plot_attribution

# --8<-- [end:imports]

# --8<-- [start:model]
training = TrainConfig(epochs=60, lr=4e-3, batch_size=16)
recipe = DemoRecipe(num_forget=4, retain_per_forget=2, num_places=6, d_model=64, d_ff=256, training=training)
fiction = make_fiction(recipe, seed=0)
model = train_base(fiction, recipe, seed=0, sets=["forget", "retain", "world"])
# --8<-- [end:model]

# --8<-- [start:scores]
forget, retain = (
    attribute_neurons(model, batches_in_order(fiction.examples[name], 16), steps=32) for name in ("forget", "retain")
)
plot_attribution(forget, "attribution.png")
for layer, scores in forget.scores.items():
    ranked = scores.clamp(min=0).sort(descending=True).values
    share = (ranked[: len(ranked) // 10].sum() / ranked.sum()).item()
    against = (scores < 0).double().mean().item()
    print(f"{layer}: the first tenth holds {share:.0%} of the support, {against:.0%} of the neurons speak against it")
    assert share > 0.2
# --8<-- [end:scores]

# --8<-- [start:choose]
chosen = {
    "top": forget.top(0.3),
    "contrast": forget.contrast(retain).top(0.3),
    "random": NeuronSelection.random(model, 0.3, torch.Generator().manual_seed(0)),
}
shared = (chosen["top"] & retain.top(0.3)).num_selected / chosen["top"].num_selected
print(f"{shared:.0%} of the top neurons are also top for the retain set")
# --8<-- [end:choose]


# --8<-- [start:silence]
def known_without(selection: NeuronSelection) -> dict[str, float]:
    """Return the mean answer probability of both sets when the selected neurons write nothing."""
    silenced = copy.deepcopy(model)
    with torch.no_grad():
        for layer in selection:
            silenced.get_submodule(layer).weight[:, selection[layer]] = 0
    scores = {name: score_answers(silenced, fiction.examples[name])["probability"] for name in ("forget", "retain")}
    return {name: sum(each) / len(each) for name, each in scores.items()}


left = {name: known_without(selection) for name, selection in chosen.items()}
for name, sets in left.items():
    print(f"without {name}: forget {sets['forget']:.2f}, retain {sets['retain']:.2f}")
# They carry the answers, and are not all that does.
assert left["top"]["forget"] < left["random"]["forget"] - 0.1
assert left["contrast"]["forget"] < left["random"]["forget"] - 0.05
assert left["contrast"]["retain"] > left["top"]["retain"] + 0.02
# --8<-- [end:silence]
