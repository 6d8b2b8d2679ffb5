"""One of two processes that train together, for the test that they make the steps of one; run as a script."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.test_trainer import make_model, make_trainer
from torch_simu.unlearning.refresh import find_simu_optimizer

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, model = Path(sys.argv[1]), make_model()
    trainer = make_trainer(model, folder, per_device_train_batch_size=2)
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    tensors = {name: value for name, value in model.state_dict().items() if "down_proj" in name}
    states = find_simu_optimizer(trainer.optimizer).state.values()
    tensors.update({f"hessian{number}": entry["hessian"] for number, entry in enumerate(states)})
    save_file(tensors, folder / f"rank{os.environ['RANK']}.safetensors")
    torch.distributed.destroy_process_group()
