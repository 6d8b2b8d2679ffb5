r"""MUSE: verbatim memorization, knowledge memorization and privacy leakage (Shi et al. 2024, arXiv 2407.06460).

Four of its six figures are of one model. The other two, scalability and sustainability, are these four again: of models
that forgot sets of growing size, and of one model after each of a series of requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch_simu._checks import problem
from torch_simu.curvature import IGNORED
from torch_simu.unlearning.data.examples import Example, Template, encode
from torch_simu.unlearning.data.fits import check_fits
from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.metrics.evaluate import mean
from torch_simu.unlearning.metrics.generation import check_rouge, generate_answers, rouge_l_f1
from torch_simu.unlearning.metrics.membership import membership_auc
from torch_simu.unlearning.metrics.scoring import min_k_log_probability, score_answers
from torch_simu.unlearning.progress import Progress, part_of, renamed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SETS = ("forget", "retain", "unseen")
_ANSWER_TOKENS = 32
_ANSWER_ENDS = ("\n\n", "\nQuestion", "Question:")


def privacy_leakage(auc: float, retrained_auc: float) -> float | None:
    r"""Return PrivLeak: how far a model is from one that never saw the forget set, to a membership attack.

    $(\mathrm{AUC} - \mathrm{AUC}_\text{retrained}) / \mathrm{AUC}_\text{retrained}$, where the AUC says how often an
    unseen row is likelier than a forget row. Below zero the forget rows still stand out as learned, -1 at the least;
    above zero they stand out as unlearned. The paper gives it in percent.

    Args:
        auc: Of the model, in [0, 1]; 0.5 is guessing.
        retrained_auc: Of the model that never saw the forget set.

    Returns:
        The leakage; None where the retrained model tells all forget rows from all others: no model is beside that.

    Examples:
        >>> privacy_leakage(0.25, 0.5), privacy_leakage(0.5, 0.5)
        (-0.5, 0.0)
    """
    return None if retrained_auc == 0 else (auc - retrained_auc) / retrained_auc


def answer_part(generated: str) -> str:
    r"""Return what a generated text says before it begins a new paragraph or another question.

    Examples:
        >>> answer_part("In Rome.\nQuestion: Where?")
        'In Rome.'
    """
    for end in _ANSWER_ENDS:
        generated = generated.split(end)[0]
    return generated


def muse_suite(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Row]],
    *,
    reference: float | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 128,
    max_length: int | None = None,
    template: Template = "auto",
    progress: Progress | None = None,
) -> dict[str, object]:
    """Measure a model as the MUSE benchmark does, on rows of one's own.

    A `raw` row is a text: of one with a prompt the model continues the prompt, of a plain text its first half of
    tokens. Any other row is a question. MUSE shows ten answered questions before each of its own; here is none.

    Args:
        model: A causal language model; its training flags are restored.
        tokenizer: The model's tokenizer.
        sets: Rows of "forget", texts and questions about them; of "retain", of which the questions are asked; and of
            "unseen", rows like those to forget that no model saw.
        reference: The "min_k_auc" of this function's result for a model trained on the retain set only.
        batch_size: Rows per forward pass and per call of `model.generate`.
        max_new_tokens: Largest number of tokens of a continuation, the model's and the text's own, where the model's
            counts up to the length of the text's own. An answer has at most 32.
        max_length: Largest number of tokens of prompt and answer; see `torch_simu.unlearning.data.examples.encode`.
        template: How a question becomes a prompt; see `torch_simu.unlearning.data.examples.render`.
        progress: Told of the stage "muse", in rows.

    Returns:
        A JSON-able dict. "verbmem": mean ROUGE-L F1 of the continuations of forget texts. "knowmem_forget" and
        "knowmem_retain": of the answers to questions. "min_k_auc": how often an unseen row is likelier than a forget
        row, by the log-probability of the 40 % least probable of its scored tokens. "privleak": `privacy_leakage`. What
        there are no rows or no reference for is None.

    Raises:
        ValueError: If a set is missing, unknown or empty.
        DataError: If a row cannot be encoded, or does not fit into the model.
        ImportError: If the package `rouge-score` is not installed.
    """
    check_muse(sets)
    # All sets are encoded before the first is measured, which takes long.
    examples = {name: encode(rows, tokenizer, max_length=max_length, template=template) for name, rows in sets.items()}
    for of_set in examples.values():
        check_fits(model, of_set)
    pairs = {name: list(zip(rows, examples[name], strict=True)) for name, rows in sets.items()}
    texts = [_continued(row, example) for row, example in pairs["forget"] if row.raw]
    questions = {name: [each for each in pairs[name] if not each[0].raw] for name in ("forget", "retain")}
    asked = [example for of_set in questions.values() for _, example in of_set]
    limits = [(texts, max_new_tokens), (asked, min(max_new_tokens, _ANSWER_TOKENS))]
    total = len(texts) + len(asked) + len(sets["forget"]) + len(sets["unseen"])
    told, done, said = renamed(progress, lambda _: "muse"), 0, []
    for part, limit in limits:
        if part:
            said += generate_answers(
                model,
                tokenizer,
                part,
                max_new_tokens=limit,
                batch_size=batch_size,
                progress=part_of(told, done, total),
            )
        done += len(part)
    likely: dict[str, list[float]] = {}
    for name in ("unseen", "forget"):
        likely[name] = score_answers(
            model,
            examples[name],
            batch_size=batch_size,
            pad_id=pad_id(tokenizer, model),
            measures={"min_k": min_k_log_probability},
            progress=part_of(told, done, total),
        )["min_k"]
        done += len(examples[name])
    auc = membership_auc(likely["unseen"], likely["forget"])
    spoken = iter(said)
    own = [_own_ids(example)[:max_new_tokens] for example in texts]
    # A text has no end that a model could learn: what it says beyond the text's own length says nothing.
    cut = [_tokens(next(spoken), tokenizer)[: len(ids)] for ids in own]
    continued = rouge_l_f1(_decoded(cut, tokenizer), _decoded(own, tokenizer))
    answered = {name: [_best(row, answer_part(next(spoken))) for row, _ in part] for name, part in questions.items()}
    return {
        "verbmem": mean(continued) if continued else None,
        **{f"knowmem_{name}": mean(values) if values else None for name, values in answered.items()},
        "min_k_auc": auc,
        "privleak": None if reference is None else privacy_leakage(auc, reference),
    }


def check_muse(sets: Mapping[str, Sequence[Row]]) -> None:
    """Raise if the suite could not be computed from these rows, before anything is generated, which takes long.

    Args:
        sets: As in `muse_suite`.

    Raises:
        ValueError: If a set is missing, unknown or empty.
        ImportError: If the package `rouge-score` is not installed.
    """
    if set(sets) != set(_SETS) or not all(sets.values()):
        sizes = {name: len(rows) for name, rows in sets.items()}
        raise ValueError(problem(f"The sets have {sizes} rows", f"some in each of {sorted(_SETS)}"))
    check_rouge()


def _continued(row: Row, example: Example) -> Example:
    """A text with its continuation scored: what follows the prompt, or the second half of a plain text."""
    if not row.is_text:
        return example
    half = len(example.input_ids) // 2
    return replace(example, labels=(IGNORED,) * half + example.input_ids[half:])


def _own_ids(example: Example) -> list[int]:
    """The scored tokens, without what ends them."""
    return list(example.input_ids[len(example.prompt_ids) : len(example.input_ids) - example.num_end])


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _decoded(texts: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in texts]


def _best(row: Row, said: str) -> float:
    """ROUGE-L F1 with the nearest of a row's right answers."""
    return max(rouge_l_f1([said] * len(row.answers), row.answers))
