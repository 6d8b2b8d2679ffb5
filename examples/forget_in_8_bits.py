"""Make an 8-bit model forget a text through deltas beside its codes, and ship the change as a patch."""

from __future__ import annotations

import copy
import logging

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from torch_simu import NeuronPatch, SIMUOptimizer, attach_deltas, attribute_neurons, gauss_newton_loss

logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
torch.manual_seed(0)

# A model that has memorized two texts; with a model of your own: from_pretrained(..., load_in_8bit=True).
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
)
forget, retain = ({"input_ids": ids, "labels": ids} for ids in torch.randint(64, (2, 4, 12)))
trainer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(60):
    (model(**forget).loss + model(**retain).loss).backward()
    trainer.step()
    trainer.zero_grad()
for name, layer in list(model.named_modules()):
    if isinstance(layer, nn.Linear) and name != "lm_head":
        quantized = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False)
        quantized.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        model.set_submodule(name, quantized.to("cpu"))
model.requires_grad_(False).eval()
base = copy.deepcopy(model)

# Step 1 through the codes, step 2 on deltas beside them.
forget_scores, retain_scores = (attribute_neurons(model, [batch], steps=32) for batch in (forget, retain))
selection = forget_scores.contrast(retain_scores).top(0.2)
deltas = attach_deltas(model, selection)
optimizer = SIMUOptimizer(list(deltas.values()), lr=1e-2, hessian_interval=5)
for _ in range(20):
    (2 * model(**retain).loss - model(**forget).loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    if optimizer.hessian_due:
        loss, num_tokens = gauss_newton_loss(model(**retain).logits, retain["labels"])
        loss.backward()
        optimizer.update_hessian(num_tokens)
        optimizer.zero_grad()
losses = {}
for name, rows in (("forget", forget), ("retain", retain)):
    losses[name] = [each(**rows).loss.item() for each in (base, model)]
print("Loss before and after:", losses)
assert losses["forget"][1] > losses["forget"][0] + 1
assert losses["forget"][1] > losses["retain"][1]

# The change is the deltas, bound to the hash of the codes and scales: those are what they were.
patch = NeuronPatch.between(base, model, selection)
audit = patch.verify(base, model)
print(patch, audit)
assert audit.passed
patch.revert(model)
assert torch.equal(model(**forget).logits, base(**forget).logits)
