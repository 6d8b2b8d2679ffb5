"""The trainer of the page on open-unlearning works with what open-unlearning passes to it."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import yaml
from transformers import TrainingArguments

from tests.language import ROWS, memorizing_model, word_tokenizer
from tests.rules.sources import ROOT
from tests.unlearning.trainer.open_unlearning import FOLDER, Collator, ForgetRetain, GradDiff, Rows, trainer_class
from torch_simu import NeuronSelection, attribute_neurons
from torch_simu.unlearning.data.examples import Example, encode
from torch_simu.unlearning.data.pairs import ForgetRetainPairs
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.objectives import Probability
from torch_simu.unlearning.trainer.trainer import SIMUOptimizerFactory, UnlearningTrainer

CONFIG = yaml.safe_load((FOLDER / "SIMU.yaml").read_text())
TOKENIZER = word_tokenizer()
EXAMPLES = encode(ROWS, TOKENIZER)
FORGET, RETAIN = EXAMPLES[:2], EXAMPLES[2:]
END = TOKENIZER.eos_token_id


def arguments(folder, **changed) -> TrainingArguments:
    options = {"max_steps": 60, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": []}
    options |= {"learning_rate": 0.04, "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    options |= {"dataloader_pin_memory": False, "remove_unused_columns": False, "bf16": False, "eval_strategy": "no"}
    return TrainingArguments(str(folder), **{**options, **CONFIG["args"], "lr_scheduler_type": "constant", **changed})


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes the trainer as `load_trainer` does, from the configuration of the page."""
    kind = trainer_class(monkeypatch)

    def made(model, retain=RETAIN, evaluators=None, method=(), **changed):
        return kind(
            model=model,
            train_dataset=ForgetRetain(Rows(FORGET), Rows(retain)),
            eval_dataset=None,
            tokenizer=TOKENIZER,
            data_collator=Collator(END),
            args=arguments(tmp_path, **changed),
            evaluators=evaluators,
            template_args={"apply_chat_template": False},
            **{**CONFIG["method_args"], **dict(method)},
        )

    return made


def known(model, examples) -> float:
    scores = score_answers(model, examples)["probability"]
    return sum(scores) / len(scores)


def test_the_forget_rows_are_forgotten_and_what_is_not_selected_keeps_its_bits(make):
    model, seen = memorizing_model(TOKENIZER), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluators = {"forget": lambda model: seen.append(known(model, FORGET)) or seen[-1]}
    changed = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "activation_checkpointing": True}
    trainer = make(
        model, method={"fraction": 0.5, "attribution_steps": 30}, evaluators=evaluators, eval_on_start=True, **changed
    )
    trainer.train()
    trainer.evaluate(metric_key_prefix="eval")
    assert seen[0] > 0.9 > 0.2 > seen[-1] and known(model, RETAIN) > 0.9
    for name, value in model.state_dict().items():
        moved = value != before[name]
        if "down_proj" not in name:
            assert not moved.any()
        else:
            assert moved.any(dim=0).sum() == value.shape[1] // 2
    layers = [layer for name, layer in model.named_modules() if name.endswith("down_proj")]
    assert layers and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_it_takes_the_steps_of_the_trainer_of_this_package(make, tmp_path):
    models = [memorizing_model(TOKENIZER) for _ in range(2)]
    make(models[0], retain=RETAIN[:1], max_steps=7).train()
    values = {name: CONFIG["method_args"][name] for name in ("betas", "hessian_interval")}
    options = {"selection": NeuronSelection.full(models[1]), "curvature": "both", "lr": 0.04, **values}
    UnlearningTrainer(
        models[1],
        arguments(tmp_path, max_steps=7),
        objective=Probability(CONFIG["method_args"]["alpha"]),
        balance=True,
        # The same two rows in each step, and the one retain row beside each.
        train_dataset=ForgetRetainPairs(FORGET, RETAIN[:1], num_pairs=2),
        optimizer_cls_and_kwargs=(SIMUOptimizerFactory, options),
    ).train()
    start = memorizing_model(TOKENIZER)
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-4)
    moved = max(
        (first - base).abs().max() for first, base in zip(models[0].parameters(), start.parameters(), strict=True)
    )
    assert moved > 0.01


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Example((5, END, 6, 7, 8), (-100, -100, -100, 7, 8)), "attention_mask has a hole"),
        (Example((5, 6, 7, END), (-100, -100, 7, END)), "labels score padding"),
    ],
)
def test_its_batches_are_refused_for_attribution_and_its_rows_are_not(row, message):
    model, rows = memorizing_model(TOKENIZER, steps=1), Rows([row])
    with pytest.raises(ValueError, match=message):
        attribute_neurons(model, [Collator(END)([rows[0]])])
    batch = {name: rows[0][name][None] for name in ("input_ids", "labels")}
    assert attribute_neurons(model, [batch], steps=1, max_completeness_error=None).num_samples == 2


def test_several_processes_and_deepspeed_are_refused_before_a_step(make):
    trainer = make(memorizing_model(TOKENIZER, steps=1))
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="one process without DeepSpeed"):
        trainer.create_optimizer()
    trainer.is_deepspeed_enabled, trainer.create_optimizer = False, lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()


def test_the_configuration_names_arguments_that_there_are(make):
    taken = {*inspect.signature(type(make(memorizing_model(TOKENIZER, steps=1)))).parameters}
    taken |= {*inspect.signature(GradDiff).parameters}
    assert set(CONFIG["method_args"]) <= taken and CONFIG["handler"] == "SIMU"


def test_the_page_says_which_commit_it_was_read_in_and_counts_its_changes():
    text = (ROOT / "docs" / "how_to" / "use_it_inside_open_unlearning.md").read_text()
    assert re.search(r"commit `[0-9a-f]{40}`", text)
    assert re.findall(r"^\*\*(\d)\.", text, re.MULTILINE) == list("12345") and "Five" in text
