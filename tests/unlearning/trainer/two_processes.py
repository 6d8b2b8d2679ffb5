"""One of two processes that train together, for the test that they make the steps of one; run as a script."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from tests.unlearning.trainer.trainer_runs import make_model, make_refresh, make_trainer
from tests.unlearning.trainer.whitened_runs import make_whitened_trainer
from torch_simu.unlearning.refresh import find_simu_optimizer


def curvature_behind(model, optimizer, saved):
    """The curvature after one more refresh from a saved state."""
    optimizer.load_state_dict(copy.deepcopy(saved))
    for group in optimizer.param_groups:
        group["next_refresh"] = group["num_steps"]
    assert make_refresh().after_step(model, optimizer, 7)
    return torch.cat([entry["hessian"].flatten() for entry in optimizer.state.values()])


def run_two_processes(folder, curvature):
    """Train in two processes, and return what each of them ended with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parents[3])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": root}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), curvature],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(2)]


def train(folder, curvature):
    """Train this process's part, and return the tensors to compare."""
    model = make_model()
    if curvature == "gnb":
        trainer = make_trainer(model, folder, per_device_train_batch_size=2)
    else:
        arguments = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
        trainer = make_whitened_trainer(model, folder, curvature, **arguments)
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    tensors = {name: value for name, value in model.state_dict().items() if "down_proj" in name}
    if curvature == "gnb":
        optimizer = find_simu_optimizer(trainer.optimizer)
        tensors.update({f"hessian{number}": entry["hessian"] for number, entry in enumerate(optimizer.state.values())})
        saved = copy.deepcopy(optimizer.state_dict())
        wrapped, plain = (curvature_behind(each, optimizer, saved) for each in (trainer.model_wrapped, model))
        assert torch.equal(wrapped, plain)
    return tensors


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    save_file(train(folder, sys.argv[2]), folder / f"rank{os.environ['RANK']}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # All is asserted and written. Threads of gloo can abort an interpreter that shuts down, so it is left at once.
    sys.stdout.flush()
    os._exit(0)
