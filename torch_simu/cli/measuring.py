"""Measuring: the sets of a job, and how they are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_simu._checks import check_count
from torch_simu.unlearning.data.examples import encode, show_example
from torch_simu.unlearning.data.rows import Row, check_disjoint, load_rows
from torch_simu.unlearning.metrics.evaluate import evaluate
from torch_simu.unlearning.progress import Progress, part_of, renamed
from torch_simu.unlearning.report.report import Measures

Show = Callable[[str], None]
"""Called once, before the work begins, with the text of the first row to forget as the model reads it."""

Sources = Mapping[str, str]
"""Set -> its file or data set; "forget" is always there."""

UNSEEN = "unseen"
"""The set of rows that no model saw, which serve membership inference and nothing else."""


def read_sets(sets: Sources) -> dict[str, list[Row]]:
    """Read the rows of each set, and raise where the forget set shares one with the retain set, or an unseen one."""
    rows = {name: load_rows(source) for name, source in sets.items()}
    for name in ("retain", UNSEEN):
        if name in rows:
            check_disjoint(rows["forget"], rows[name], other=name)
    return rows


def show_first(
    rows: Mapping[str, list[Row]], tokenizer: PreTrainedTokenizerBase, max_length: int | None, show: Show | None
) -> None:
    """Show the first of the rows to forget, as the model reads it: by its tokenizer, cut to `max_length`."""
    if show is not None:
        (example,) = encode(rows["forget"][:1], tokenizer, max_length=max_length)
        show(f"First row to forget, its scored part between >>> and <<<:\n{show_example(example, tokenizer)}\n")


@dataclass(frozen=True, slots=True)
class Measuring:
    """How the sets of a job are measured.

    Args:
        batch_size: Rows per forward pass and per call of `generate`.
        max_length: Largest number of tokens of prompt and answer; a longer prompt loses its beginning.
        max_new_tokens: Longest generation; None: as the longest answer, and as a suite has it.

    Raises:
        ValueError: If a number is not positive.
    """

    batch_size: int = 16
    max_length: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        for name in ("max_length", "max_new_tokens"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))

    def measures(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Mapping[str, Sequence[Row]],
        stage: str,
        progress: Progress | None = None,
    ) -> dict[str, Measures]:
        """Return what a model knows of each set of rows, read by its tokenizer, and tell `progress` of one stage."""
        # A row counts twice: it is scored, and generated.
        total, done = 2 * sum(map(len, rows.values())), 0
        found: dict[str, Measures] = {}
        for name, part in rows.items():
            found[name] = evaluate(
                model,
                tokenizer,
                part,
                rouge=False,
                batch_size=self.batch_size,
                max_length=self.max_length,
                max_new_tokens=self.max_new_tokens,
                progress=part_of(renamed(progress, lambda _: stage), done, total),
            ).means
            done += 2 * len(part)
        return found
