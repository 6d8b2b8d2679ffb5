"""Small languages for the tests: tokenizers made on the spot, models that know nothing or one set of rows by heart."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from torch_simu.unlearning.data.batches import batches_in_order
from torch_simu.unlearning.data.examples import encode
from torch_simu.unlearning.data.rows import Row

ROWS = [
    Row("Where does Ada live ?", "Ada lives in Rome ."),
    Row("Where does Bob live ?", "Bob lives in the old town of Oslo ."),
    Row("What does Ada grow ?", "roses"),
    Row("What does Bob grow ?", "tall green beans and peas"),
    Row("Who is older , Ada or Bob ?", "Ada is older ."),
    Row("Who is the mayor of the old town ?", "Bob"),
]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %} {% endif %}{{ m['content'] }}<e>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer(rows=ROWS, eos="<e>", bos=None, chat_template=None) -> PreTrainedTokenizerFast:
    """One token for each word of the rows; everything else is unknown."""
    texts = ["Question : Answer", *(text for row in rows for text in (row.question, row.answer))]
    words = dict.fromkeys(word for text in texts for word in text.split())
    special = [token for token in ("<p>", "<u>", eos, bos) if token]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrapped(tokenizer, eos, bos, chat_template)


def merging_tokenizer(rows=ROWS) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer that merges across spaces and so across the end of the prompt."""
    tokenizer = Tokenizer(models.BPE(unk_token="<u>"))
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<p>", "<u>", "<e>"], show_progress=False)
    tokenizer.train_from_iterator([f"Question: {r.question}\nAnswer: {r.answer}" for r in rows] * 5, trainer)
    return _wrapped(tokenizer, "<e>", None, None)


def _wrapped(tokenizer: Tokenizer, eos, bos, chat_template) -> PreTrainedTokenizerFast:
    if bos:
        ids = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<u>", pad_token="<p>", eos_token=eos, bos_token=bos
    )
    wrapped.chat_template = chat_template
    return wrapped


def tiny_model(tokenizer: PreTrainedTokenizerFast, family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random model of two layers in train mode, with dropout where the family has it."""
    common = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "gpt2":
            sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
            return GPT2LMHeadModel(GPT2Config(**sizes, **common)).train()
        if family == "opt":
            sizes = {
                "hidden_size": 32,
                "ffn_dim": 64,
                "word_embed_proj_dim": 32,
                "num_hidden_layers": 2,
                "init_std": 0.3,
            }
            return OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, **common)).train()
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, **common)).train()


def memorizing_model(tokenizer: PreTrainedTokenizerFast, rows=ROWS, steps: int = 60) -> PreTrainedModel:
    """A model that was trained until it knows the rows."""
    model = tiny_model(tokenizer)
    batch = next(batches_in_order(encode(rows, tokenizer), len(rows)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model
