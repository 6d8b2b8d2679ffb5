"""A plain PyTorch training loop that makes a model forget: memorize two sets, then forget one and keep the other."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from torch_simu import SIMUOptimizer, attribute_neurons, gauss_newton_loss

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)
model = LlamaForCausalLM(config)
forget, retain = ({"input_ids": ids, "labels": ids} for ids in torch.randint(1, 64, (2, 16, 12)))

# Something to forget: both sets are memorized.
adam = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(150):
    loss = (model(**forget).loss + model(**retain).loss) / 2
    loss.backward()
    adam.step()
    adam.zero_grad()
print(f"memorized: forget loss {model(**forget).loss.item():.2f}, retain loss {model(**retain).loss.item():.2f}")

# Step 1: which neurons the forget set rests on, and the retain set does not. What is memorized saturates early on the
# path, so it takes more points than usual for the scores to add up.
forget_scores, retain_scores = (attribute_neurons(model, [batch], steps=64) for batch in (forget, retain))
selection = forget_scores.contrast(retain_scores).top(0.2)
before = {name: param.detach().clone() for name, param in model.named_parameters()}

# Step 2: your loop, with two more lines for the curvature. Nothing but the selected neurons requires a gradient.
optimizer = SIMUOptimizer(selection.param_groups(model, attention="frozen"), lr=4e-3, hessian_interval=5)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.2, total_iters=10)
forgotten, steps = 0.0, 0
while forgotten < 2.0 and steps < 60:
    loss = model(**retain).loss - model(**forget).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if optimizer.hessian_due:
        curvature_loss, num_tokens = gauss_newton_loss(model(**retain).logits, retain["labels"])
        curvature_loss.backward()
        optimizer.update_hessian(num_tokens)
        optimizer.zero_grad()
    forgotten, steps = model(**forget).loss.item(), steps + 1
kept = model(**retain).loss.item()
print(f"forgot in {steps} steps: forget loss {forgotten:.2f}, retain loss {kept:.2f}")
assert forgotten >= 2.0
assert kept < 0.5

# What changed: the selected columns of the down projections, and no other bit of the model.
for name, param in model.named_parameters():
    layer = name.removesuffix(".weight")
    changed = (param != before[name]).nonzero()
    assert not len(changed) or set(changed[:, 1].tolist()) <= set(selection[layer].tolist())
print(f"{selection.fraction:.0%} of the neurons changed; they alone have optimizer state.")
