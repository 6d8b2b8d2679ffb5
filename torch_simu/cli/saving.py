"""Saving: what a job writes into the folder of its result."""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_simu._checks import problem
from torch_simu.attribution import Attribution
from torch_simu.cli.loading import DELTAS, quiet_transformers
from torch_simu.deltas import attached_layers, detach_deltas, save_deltas
from torch_simu.neurons import NeuronSelection
from torch_simu.unlearning.report.plots import plot_attribution
from torch_simu.unlearning.report.report import write_json


def save_scores(selection: NeuronSelection, attribution: Attribution, folder: Path) -> None:
    """Write an attribution: scores, selection, heat map and what a person reads of them into a folder."""
    selection.save(folder / "selection.safetensors")
    attribution.save(folder / "attribution.safetensors")
    plot_attribution(attribution, folder / "attribution.png", selection=selection)
    layers = {
        layer: {
            "selected": len(selection[layer]),
            "num_neurons": selection.num_neurons[layer],
            "largest_score": attribution.scores[layer].max().item(),
            "sum": attribution.scores[layer].sum().item(),
            **{
                name: float(found[layer])
                for name, found in (
                    ("completeness_error", attribution.completeness_error),
                    ("incompleteness", attribution.incompleteness),
                    ("standard_error", {at: each.norm() for at, each in attribution.standard_error.items()}),
                )
                if layer in found
            },
        }
        for layer in selection
    }
    write_json(folder / "attribution.json", {"provenance": dict(attribution.provenance), "layers": layers})


def exactness(attribution: Attribution, fraction: float = 0.1) -> str:
    """Say how far scores are from adding up, or of an estimate, how far its two halves name the same neurons.

    Args:
        attribution: The scores.
        fraction: Share of the neurons that the halves name.
    """
    if attribution.standard_error:
        one, two = attribution.halves
        text = "The scores are an estimate"
        if not 0 < fraction < 1:
            return f"{text}."
        same = one.stability(two, fraction)
        return (
            f"{text}: each half of it names {same:.0%} of the top {fraction:.0%} of neurons that the other half names."
        )
    if not attribution.incompleteness:
        return "How far the scores are from adding up was not measured: the budget sufficed for one path point."
    share = max(attribution.incompleteness.values(), default=0.0)
    return f"The scores of a layer miss at most {share:.1%} of the change that they explain."


def check_saves(model: PreTrainedModel) -> None:
    """Raise before the work begins when the model could not be written after it.

    Raises:
        ValueError: If its generation configuration is one that transformers does not save.
    """
    if model.generation_config is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.generation_config.save_pretrained(folder)
        except (ValueError, TypeError) as error:
            reason = str(error).strip().splitlines()[0]
            wrong = f"The generation configuration of the model cannot be saved ({reason})"
            raise ValueError(problem(wrong, "a valid one", "Mend its generation_config.json.")) from error


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model and its tokenizer into a folder; deltas go into a file of their own, and leave the model."""
    if attached_layers(model):
        # The base stays what it was; its deltas go beside it.
        save_deltas(model, folder / DELTAS)
        detach_deltas(model)
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
