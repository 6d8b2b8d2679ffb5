"""Make a model forget in the Hugging Face Trainer, which keeps its schedules, logs and checkpoints."""

# --8<-- [start:imports]
from __future__ import annotations

import tempfile

from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from torch_simu import NeuronSelection
from torch_simu.unlearning.data.pairs import ForgetRetainPairs
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction, train_base
from torch_simu.unlearning.demo.memorize import TrainConfig
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.objectives import Probability
from torch_simu.unlearning.trainer.trainer import SIMUOptimizerFactory, UnlearningTrainer

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


# --8<-- [start:stop]
class StopWhenForgotten(TrainerCallback):
    """Ends the training behind the first step after which the forget set is forgotten."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = known("forget") <= 0.1


# --8<-- [end:stop]

# --8<-- [start:train]
arguments = TrainingArguments(
    tempfile.mkdtemp(),
    per_device_train_batch_size=16,
    max_steps=200,
    max_grad_norm=0,  # a step has its length whatever the gradient's is
    lr_scheduler_type="constant",
    use_cpu=True,
    dataloader_pin_memory=False,
    report_to=[],
    disable_tqdm=True,
)
options = {"curvature": "both", "lr": 0.02, "betas": (0.9, 0.8), "hessian_interval": 5}
trainer = UnlearningTrainer(
    model,
    arguments,
    objective=Probability(retain_weight=2.0),
    balance=True,
    train_dataset=ForgetRetainPairs(fiction.examples["forget"], fiction.examples["retain"]),
    optimizer_cls_and_kwargs=(SIMUOptimizerFactory, {"selection": NeuronSelection.full(model), **options}),
    callbacks=[StopWhenForgotten()],
)
trainer.remove_callback(PrinterCallback)
trainer.train()
# --8<-- [end:train]

# --8<-- [start:result]
for name, probability in before.items():
    print(f"{name}: {probability:.2f} before, {known(name):.2f} after {trainer.state.global_step} steps")
assert min(before.values()) > 0.9
assert known("forget") <= 0.1
assert known("retain") > 0.9
# --8<-- [end:result]
