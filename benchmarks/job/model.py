"""The model of the jobs: SmolLM2, or a tiny one with its tokenizer to try the script."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.pretrained.facts import plain_texts
from benchmarks.pretrained.model import make_folder


def make_model(folder: Path, *, tiny: bool) -> None:
    """Make the folder where it is not there yet."""
    if not tiny:
        make_folder(folder)
    elif not folder.exists():
        backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<eos>"], show_progress=False)
        backend.train_from_iterator(plain_texts(16, words=(25, 45)), trainer)
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=backend.get_vocab_size(), **sizes))
        model.save_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
        tokenizer.save_pretrained(folder)
