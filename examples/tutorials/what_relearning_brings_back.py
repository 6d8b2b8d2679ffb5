"""Teach a model a third of what it forgot, and see how much of the rest comes back."""

# --8<-- [start:imports]
from __future__ import annotations

import copy

from torch_simu.unlearning.attack.attack import attack_model
from torch_simu.unlearning.attack.config import AttackConfig
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction, train_base
from torch_simu.unlearning.demo.memorize import TrainConfig
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.report.style import label_ends, looks, new_figure, save_figure, styled

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
models["retrained"] = train_base(fiction, recipe, seed=0, sets=["retain", "world"])
# --8<-- [end:models]

# --8<-- [start:attack]
attack = AttackConfig(rates=(1e-3,), steps=20, interval=2)
back, ends, drawn = {}, {}, looks(list(models))
figure = new_figure(7.6, 3.6)
with styled():
    axes = figure.add_subplot()
    axes.set(
        xlabel="steps of relearning", ylabel="mean probability, rows not taught", xlim=(0, attack.steps), ylim=(0, 1)
    )
    for name, model in models.items():
        found = attack_model(model, forget, attacks=["relearn"], config=attack)["relearn"]
        points = [(0, found.before.probability)] + [(point.step, point.probability) for point in found.trace]
        color, marker = drawn[name]
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4)
        back[name], ends[name] = found.probability, points[-1]
        print(f"{name}: {found.before.probability:.2f}, at most {back[name]:.2f}; {found.num_taught} rows are taught")
    label_ends(axes, ends, drawn)
save_figure(figure, "relearning.png")
# --8<-- [end:attack]

# --8<-- [start:claim]
assert back["simu"] < back["simu_graddiff"] < back["before"]
assert back["simu"] > 1.2 * back["retrained"]
# --8<-- [end:claim]
