"""Load a model in 8 bits, make it forget beside its codes, and ship the deltas."""

# --8<-- [start:imports]
from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from torch_simu.deltas import decode_model, load_deltas, save_deltas
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction, train_base
from torch_simu.unlearning.demo.memorize import TrainConfig
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.metrics.scoring import score_answers

# --8<-- [end:imports]

# --8<-- [start:model]
# bitsandbytes says at every pass that it rounds inputs.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
training = TrainConfig(epochs=60, lr=4e-3, batch_size=16)
recipe = DemoRecipe(num_forget=4, retain_per_forget=2, num_places=6, d_model=64, d_ff=256, training=training)
fiction = make_fiction(recipe, seed=0)
folder = Path(tempfile.mkdtemp())
train_base(fiction, recipe, seed=0, sets=["forget", "retain", "world"]).save_pretrained(folder / "float")
# --8<-- [end:model]


# --8<-- [start:load]
def load() -> PreTrainedModel:
    """Load the model in 8 bits; `load_in_8bit=True` is no argument of from_pretrained in transformers 5."""
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config)


model = load()
codes = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.dtype == torch.int8}
print(f"{len(codes)} layers hold codes of 8 bits")
assert codes
# --8<-- [end:load]


# --8<-- [start:forget]
def known(asked: PreTrainedModel, name: str) -> float:
    """Return the mean probability of the answers of a set."""
    scores = score_answers(asked, fiction.examples[name])["probability"]
    return sum(scores) / len(scores)


before = {name: known(model, name) for name in ("forget", "retain", "world")}
unlearn(model, fiction.examples["forget"], fiction.examples["retain"], config=UnlearnConfig(forget_target=0.1))
for name, probability in before.items():
    print(f"{name}: {probability:.2f} before, {known(model, name):.2f} after")
assert min(before.values()) > 0.9
assert known(model, "forget") <= 0.1
assert known(model, "retain") > 0.9
assert all(torch.equal(model.state_dict()[name], code) for name, code in codes.items())
# --8<-- [end:forget]

# --8<-- [start:ship]
save_deltas(model, folder / "deltas.safetensors")
served = load()
print(f"the base alone says everything: {known(served, 'forget'):.2f}")
load_deltas(served, folder / "deltas.safetensors")
print(f"with its deltas: {known(served, 'forget'):.2f}")
assert abs(known(served, "forget") - known(model, "forget")) < 1e-6
# --8<-- [end:ship]

# --8<-- [start:plain]
decode_model(served)
served.save_pretrained(folder / "plain")
anywhere = AutoModelForCausalLM.from_pretrained(folder / "plain")
print(f"one float model that forgets in any loader: {known(anywhere, 'forget'):.2f}")
assert known(anywhere, "forget") < 0.15
# --8<-- [end:plain]
