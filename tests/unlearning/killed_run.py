"""A run in a process of its own, for test_resuming: it kills itself at a step, or goes on and saves the result."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tests.unlearning.test_driver import FAST
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.driver import unlearn

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, last = Path(sys.argv[1]), int(sys.argv[2])

    def tell(stage, done, total, note=""):
        if stage == "unlearn" and done == last:
            os.kill(os.getpid(), signal.SIGKILL)

    rows = json.loads((folder / "rows.json").read_text())
    examples = {name: [Example(tuple(ids), tuple(labels)) for ids, labels in part] for name, part in rows.items()}
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    config = FAST.updated(checkpoint_interval=1)
    unlearn(model, examples["forget"], examples["retain"], config=config, checkpoint=folder / "run", progress=tell)
    model.save_pretrained(folder / "result")
