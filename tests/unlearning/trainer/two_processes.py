"""One of two processes that train together, for the test that they make the steps of one; run as a script."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from tests.unlearning.trainer.trainer_runs import make_model, make_refresh, make_trainer
from torch_simu.unlearning.refresh import find_simu_optimizer


def curvature_behind(model, optimizer, saved):
    """The curvature after one more refresh from a saved state."""
    optimizer.load_state_dict(copy.deepcopy(saved))
    for group in optimizer.param_groups:
        group["next_refresh"] = group["num_steps"]
    assert make_refresh().after_step(model, optimizer, 7)
    return torch.cat([entry["hessian"].flatten() for entry in optimizer.state.values()])


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, model = Path(sys.argv[1]), make_model()
    trainer = make_trainer(model, folder, per_device_train_batch_size=2)
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    optimizer = find_simu_optimizer(trainer.optimizer)
    tensors = {name: value for name, value in model.state_dict().items() if "down_proj" in name}
    tensors.update({f"hessian{number}": entry["hessian"] for number, entry in enumerate(optimizer.state.values())})
    save_file(tensors, folder / f"rank{os.environ['RANK']}.safetensors")

    saved = copy.deepcopy(optimizer.state_dict())
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    wrapped, plain = (curvature_behind(each, optimizer, saved) for each in (trainer.model_wrapped, model))
    assert torch.equal(wrapped, plain)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # All is asserted and written. Threads of gloo can abort an interpreter that shuts down, so it is left at once.
    sys.stdout.flush()
    os._exit(0)
