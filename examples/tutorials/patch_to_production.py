"""Send an erasure to a model in production as a small file, check it, and take it back to the last bit."""

# --8<-- [start:imports]
from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from torch_simu import NeuronPatch
from torch_simu.patch import apply_to_checkpoint, patch_between_checkpoints, revert_checkpoint, verify_checkpoint
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction, train_base
from torch_simu.unlearning.demo.memorize import TrainConfig
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.metrics.scoring import score_answers

# --8<-- [end:imports]

# --8<-- [start:model]
training = TrainConfig(epochs=60, lr=4e-3, batch_size=16)
recipe = DemoRecipe(num_forget=4, retain_per_forget=2, num_places=6, d_model=64, d_ff=256, training=training)
fiction = make_fiction(recipe, seed=0)
model = train_base(fiction, recipe, seed=0, sets=["forget", "retain", "world"])
folder = Path(tempfile.mkdtemp())
model.save_pretrained(folder / "production")


def known(served: PreTrainedModel) -> float:
    """Return the mean probability of the forget answers."""
    scores = score_answers(served, fiction.examples["forget"])["probability"]
    return sum(scores) / len(scores)


# --8<-- [end:model]

# --8<-- [start:make]
done = unlearn(model, fiction.examples["forget"], fiction.examples["retain"], config=UnlearnConfig(forget_target=0.1))
model.save_pretrained(folder / "unlearned")
patch = patch_between_checkpoints(
    folder / "production", folder / "unlearned", done.selection, provenance={"request": "2026-11-28/1"}
)
patch.save(folder / "forget.safetensors")
print(patch)
# --8<-- [end:make]

# --8<-- [start:apply]
patch = NeuronPatch.load(folder / "forget.safetensors")
apply_to_checkpoint(patch, folder / "production", folder / "patched")
audit = verify_checkpoint(patch, folder / "production", folder / "patched")
print(audit)
assert audit.passed
production, patched = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("production", "patched"))
print(f"forget answers: {known(production):.2f} in production, {known(patched):.2f} with the patch")
assert known(production) > 0.9
assert known(patched) <= 0.1
# --8<-- [end:apply]

# --8<-- [start:refused]
try:
    patch.apply(patched)
except ValueError as error:
    print(f"applied twice: {error}")
else:
    raise AssertionError("a patch went on twice")
# --8<-- [end:refused]

# --8<-- [start:back]
revert_checkpoint(patch, folder / "patched", folder / "restored")
restored = AutoModelForCausalLM.from_pretrained(folder / "restored").state_dict()
assert all(torch.equal(tensor, restored[name]) for name, tensor in production.state_dict().items())
patch.apply(production)
assert known(production) <= 0.1
patch.revert(production)
assert all(torch.equal(tensor, restored[name]) for name, tensor in production.state_dict().items())
print("taken back: every weight has the bits that it had")
# --8<-- [end:back]
