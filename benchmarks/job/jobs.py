"""The jobs: each loads a model, lets it forget, measures and saves it; what differs is how it steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.job.phases import Phases
from torch_simu import NeuronSelection, attribute_neurons
from torch_simu.cli.loading import load_model
from torch_simu.curvature import gauss_newton_loss
from torch_simu.deltas import save_deltas
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.batches import batches_in_order
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.objectives import GradDiff, answer_logits
from torch_simu.unlearning.steps import StepBatches

FRACTION = 0.1
PASSES = 2
"""Of each row in an estimate of attribution; exact attribution takes hundreds."""


@dataclass(frozen=True)
class Job:
    """What all jobs share.

    Args:
        folder: Of the model.
        out: Where the result goes.
        sets: "forget" and "retain".
        steps: How many.
        batch_size: Rows of each set in a step.
        phases: Where the time is counted.
    """

    folder: Path
    out: Path
    sets: Mapping[str, list[Example]]
    steps: int
    batch_size: int
    phases: Phases

    def config(self, **changes: object) -> UnlearnConfig:
        """The choices of a run that ends with its last step, not at a target."""
        sizes = {f"{name}_batch_size": self.batch_size for name in ("forget", "retain", "hessian")}
        return UnlearnConfig(**{**sizes, "max_steps": self.steps, "forget_target": 1e-3, **changes})

    def loaded(self) -> PreTrainedModel:
        """The model in float32."""
        with self.phases.of("load"):
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.phases.count_mapped(self.folder)
        return model

    def run(self, model: PreTrainedModel, config: UnlearnConfig, selection: NeuronSelection | None = None) -> None:
        """Let it forget as the package does."""
        with self.phases.of_unlearn():
            unlearn(model, self.sets["forget"], self.sets["retain"], config=config, selection=selection)

    def in_place(self, model: PreTrainedModel, config: UnlearnConfig, selection: NeuronSelection | None = None) -> None:
        """Let it forget, and save the whole model."""
        self.run(model, config, selection)
        with self.phases.of("saving"):
            model.save_pretrained(self.out)

    def by_loop(
        self, model: PreTrainedModel, optimizer: Optimizer, refresh: Callable[[int], None] | None = None
    ) -> None:
        """Descend GradDiff in a loop without more than it needs, measure once, and save what `model` saves."""
        stream = StepBatches(self.sets["forget"], self.sets["retain"], self.config(), 0, model.device)
        objective = GradDiff()
        for number in range(self.steps):
            with self.phases.of("passes"):
                terms = objective.terms(model, stream.batch("forget", number), stream.batch("retain", number))
                for term in terms:
                    (term.weight * term.loss).backward()
            with self.phases.of("step"):
                optimizer.step()
                optimizer.zero_grad()
            if refresh is not None:
                with self.phases.of("curvature"):
                    refresh(number)
        with self.phases.of("measuring"):
            score_answers(model, self.sets["forget"])
        with self.phases.of("saving"):
            model.save_pretrained(self.out)


def simu(job: Job) -> None:
    """The default: no attribution, all neurons, steps by covariances."""
    job.in_place(job.loaded(), job.config())


def simu_graddiff(job: Job) -> None:
    """The paper's step on a tenth of the neurons, which an estimate of attribution chooses."""
    model = job.loaded()
    with job.phases.of("attribution"):
        flags = [(param, param.requires_grad) for param in model.parameters()]
        model.requires_grad_(False)
        draw = torch.Generator().manual_seed(0)
        scores = [
            attribute_neurons(model, batches_in_order(rows, 32), method="packed", budget=PASSES, generator=draw)
            for rows in job.sets.values()
        ]
        selection = scores[0].contrast(scores[1]).top(FRACTION)
        for param, flag in flags:
            param.requires_grad_(flag)
    job.in_place(model, job.config(method="simu_graddiff"), selection)


def on_codes(load_in: str) -> Callable[[Job], None]:
    """Deltas beside codes of 8 or 4 bits, of a tenth of the neurons of each layer, by covariances; they are saved."""

    def run(job: Job) -> None:
        import bitsandbytes  # noqa: F401

        with job.phases.of("load"):
            model, _ = load_model(str(job.folder), load_in=load_in, device="cpu")
        job.phases.count_mapped(job.folder)
        draw = torch.Generator().manual_seed(0)
        job.run(model, job.config(), NeuronSelection.random(model, FRACTION, draw))
        with job.phases.of("saving"):
            save_deltas(model, job.out / "deltas.safetensors")

    return run


def full(job: Job) -> None:
    """AdamW on all weights."""
    model = job.loaded()
    job.by_loop(model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True))


def lora(targets: str | list[str], eight_bits: bool) -> Callable[[Job], None]:
    """LoRA of rank 8; the adapter is saved."""

    def run(job: Job) -> None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(job.loaded(), LoraConfig(r=8, lora_alpha=32, target_modules=targets))
        trained = [param for param in model.parameters() if param.requires_grad]
        if eight_bits:
            from bitsandbytes.optim import AdamW8bit

            optimizer: Optimizer = AdamW8bit(trained, lr=1e-4)
        else:
            optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        job.by_loop(model, optimizer)

    return run


class MaskedSophia(Optimizer):
    """Sophia over whole tensors with a mask of bools on what it changes, in place."""

    def __init__(self, params: list[nn.Parameter], masks: Mapping[nn.Parameter, Tensor]) -> None:
        super().__init__(params, {"lr": 1e-5})
        for param in params:
            zeros = [torch.zeros_like(param, memory_format=torch.contiguous_format) for _ in range(2)]
            mask = masks.get(param, torch.zeros(param.shape, dtype=torch.bool))
            self.state[param] = {"mask": mask, "exp_avg": zeros[0], "hessian": zeros[1]}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step."""
        for param, state in self.state.items():
            state["exp_avg"].lerp_(param.grad, 0.035)
            update = torch.mul(state["hessian"], 0.04).clamp_(min=1e-12)
            torch.div(state["exp_avg"], update, out=update).clamp_(-1, 1).mul_(state["mask"])
            param.add_(update, alpha=-1e-5)

    @torch.no_grad()
    def refresh(self, num_tokens: int) -> None:
        """Fold the squared gradient of sampled labels in."""
        for param, state in self.state.items():
            state["hessian"].lerp_(param.grad.square().mul_(num_tokens), 0.01)


def masked_sophia(job: Job) -> None:
    """Sophia on all weights, with a mask that lets a tenth of the neurons change, as it is published."""
    model = job.loaded()
    selection = NeuronSelection.random(model, FRACTION, torch.Generator().manual_seed(0))
    weights = {name: model.get_submodule(name).weight for name in selection}
    masks = {weight: selection.mask(name).expand_as(weight) for name, weight in weights.items()}
    optimizer = MaskedSophia(list(model.parameters()), masks)
    stream = StepBatches(job.sets["forget"], job.sets["retain"], job.config(), 0, model.device)

    def refresh(number: int) -> None:
        if number % 10 == 0:
            batch = stream.batch("retain", number)
            loss, num_tokens = gauss_newton_loss(answer_logits(model, batch), batch["labels"])
            loss.backward()
            optimizer.refresh(num_tokens)
            optimizer.zero_grad()

    job.by_loop(model, optimizer, refresh)


JOBS: Mapping[str, Callable[[Job], None]] = MappingProxyType(
    {
        "simu": simu,
        "simu_graddiff": simu_graddiff,
        "simu on 8-bit codes": on_codes("8bit"),
        "simu on 4-bit codes": on_codes("4bit"),
        "full, AdamW": full,
        "LoRA, all layers, AdamW": lora("all-linear", False),
        "LoRA, down projections, AdamW": lora(["down_proj"], False),
        "LoRA, all layers, 8-bit AdamW": lora("all-linear", True),
        "dense masked Sophia": masked_sophia,
    }
)
"""Name -> what runs it."""


def names() -> Iterator[str]:
    """In the order in which they run."""
    yield from JOBS
