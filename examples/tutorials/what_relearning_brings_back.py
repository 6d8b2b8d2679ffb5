"""Teach a model a third of what it forgot, and see how much of the rest comes back."""

# --8<-- [start:imports]
from __future__ import annotations

import copy

from matplotlib.figure import Figure

from torch_simu.unlearning.attack.attack import attack_model
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction, train_base
from torch_simu.unlearning.demo.memorize import TrainConfig
from torch_simu.unlearning.driver import unlearn

# --8<-- [end:imports]

# --8<-- [start:models]
training = TrainConfig(epochs=60, lr=4e-3, batch_size=16)
recipe = DemoRecipe(num_forget=4, retain_per_forget=2, num_places=6, d_model=64, d_ff=256, training=training)
fiction = make_fiction(recipe, seed=0)
forget, retain = fiction.examples["forget"], fiction.examples["retain"]
before = train_base(fiction, recipe, seed=0, sets=["forget", "retain", "world"])
models = {"before": before}
for method, lr in (("simu_graddiff", 1e-3), ("simu", 0.04)):
    models[method] = copy.deepcopy(before)
    config = UnlearnConfig(method=method, lr=lr, hessian_interval=5, attribution_steps=5, max_completeness_error=None)
    unlearn(models[method], forget, retain, config=config)
models["never saw them"] = train_base(fiction, recipe, seed=0, sets=["retain", "world"])
# --8<-- [end:models]

# --8<-- [start:attack]
attack = AttackConfig(rates=(1e-3,), steps=20, interval=2)
figure = Figure(figsize=(7.6, 3.6), layout="constrained")
axes, back = figure.add_subplot(), {}
for name, model in models.items():
    found = attack_model(model, forget, attacks=["relearn"], config=attack)["relearn"]
    points = [(0, found.before.probability)] + [(point.step, point.probability) for point in found.trace]
    axes.plot(*zip(*points, strict=True), marker=".", label=name)
    back[name] = found.probability
    print(f"{name}: {found.before.probability:.2f}, at most {back[name]:.2f} while {found.num_taught} rows are taught")
axes.set(xlabel="steps of relearning", ylabel="mean probability of the rows not taught", ylim=(0, 1))
figure.legend(loc="outside right upper")
figure.savefig("relearning.png", dpi=130)
# --8<-- [end:attack]

# --8<-- [start:claim]
assert back["simu"] < back["simu_graddiff"] < back["before"]
assert back["simu"] > 1.2 * back["never saw them"]
# --8<-- [end:claim]
