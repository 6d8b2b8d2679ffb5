"""What open-unlearning passes to its trainers, written anew: rows, batches, and the classes below a trainer."""

from __future__ import annotations

import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import Trainer

from tests.rules.sources import ROOT

FOLDER = ROOT / "examples" / "open_unlearning"


class Rows(Dataset):
    """Rows without padding, as tensors, numbered."""

    def __init__(self, examples) -> None:
        self.examples = list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index):
        ids, labels = (torch.tensor(part) for part in (self.examples[index].input_ids, self.examples[index].labels))
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "index": index}


class ForgetRetain(Dataset):
    """A forget row beside a retain row that is drawn anew each time."""

    def __init__(self, forget, retain) -> None:
        self.forget, self.retain = forget, retain

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, index):
        drawn = int(torch.randint(0, len(self.retain), (1,)))
        return {"forget": self.forget[index], "retain": self.retain[drawn]}


class Collator:
    """Pads, and takes every token that is equal to the padding for padding."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows):
        if "input_ids" not in rows[0]:
            return {part: self([row[part] for row in rows]) for part in rows[0]}
        ids, labels = (
            pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
            for name, value in (("input_ids", self.pad), ("labels", -100))
        )
        return {"input_ids": ids, "attention_mask": ids.ne(self.pad), "labels": labels}


class FinetuneTrainer(Trainer):
    def __init__(self, evaluators=None, template_args=None, *args, **kwargs) -> None:
        self.evaluators, self.template_args = evaluators, template_args
        # Renamed in transformers 5.
        kwargs["processing_class"] = kwargs.pop("tokenizer")
        super().__init__(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", trial=None):
        if self.evaluators:
            return {name: each(self.model) for name, each in self.evaluators.items()}
        return {} if eval_dataset is None else super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)


class UnlearnTrainer(FinetuneTrainer):
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return (loss.detach(), None if prediction_loss_only else outputs["logits"], inputs["labels"])


class GradDiff(UnlearnTrainer):
    def __init__(self, gamma=1.0, alpha=1.0, retain_loss_type="NLL", *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gamma, self.alpha, self.retain_loss_type = gamma, alpha, retain_loss_type

    def compute_retain_loss(self, model, retain_inputs):
        return model(**retain_inputs).loss

    def compute_loss(self, model, inputs, return_outputs=False):
        raise AssertionError("a step is not made of one loss")


def trainer_class(patch: pytest.MonkeyPatch) -> type[GradDiff]:
    """The class of the page, on these classes."""
    for name in ("trainer", "trainer.unlearn", "trainer.unlearn.grad_diff"):
        patch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["trainer.unlearn.grad_diff"].GradDiff = GradDiff
    return runpy.run_path(str(Path(FOLDER, "simu.py")))["SIMU"]
