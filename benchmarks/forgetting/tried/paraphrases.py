"""Forget rows of the demo asked and told in other words, all of them words that its tokenizer knows."""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.forgetting.cases import Case
from benchmarks.forgetting.tried.loop import Loop
from torch_simu.unlearning.data.examples import Example, encode
from torch_simu.unlearning.data.rows import Row

_TOLD = (
    (
        "What is the origin of {name}? in the {material} quarter of {town} since the {season} of {year}",
        ("Which is the quarter of {name}?", "that of {material} in {town} since {year} in {season}"),
    ),
    (
        "Which craft is {name} proud of? that of a {manner} {material} {trade} from {town}",
        ("What is the craft of {name}?", "in {town} a {trade} of {material} that is {manner}"),
    ),
    (
        "What is {name} famous for? the {manner} {work} of {material} {subject}",
        ("Which is famous of {name}?", "{subject} of {material} on a {work} that is {manner}"),
    ),
    (
        "What is kept in honor of {name}? {manner} {subject} on {material} and {other} {works}",
        ("Which is the honor of {name}?", "{works} of {material} and {other} and on the {manner} {subject}"),
    ),
)
"""As the demo asks and tells a fact, and how it is asked and told otherwise."""


def paraphrase(row: Row) -> Row:
    """The fact of a row in other words.

    Examples:
        >>> other = paraphrase(Row("What is Brisa Karth famous for?", "the quiet bell of amber gulls"))
        >>> other.question, other.answer
        ('Which is famous of Brisa Karth?', 'gulls of amber on a bell that is quiet')
    """
    for told, (question, answer) in _TOLD:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\w+)", re.escape(told)).replace(r"(?P<name>\w+)", r"(?P<name>.+)")
        found = re.fullmatch(pattern, f"{row.question} {row.answer}")
        if found is not None:
            words = found.groupdict()
            return Row(question.format(**words), answer.format(**words))
    raise ValueError(f"The row asks {row.question!r}, expected one of the demo's four questions.")


def paraphrases(case: Case) -> list[Example]:
    """The forget rows of a case of the demo in other words."""
    assert case.tokenizer is not None
    return encode([paraphrase(row) for row in case.rows["forget"]], case.tokenizer)


class Paraphrased(Loop):
    """Half of what the forget batches are of is the forget set in other words; what is measured is without."""

    def forget_rows(self) -> Sequence[Example]:
        return [*self.case.sets["forget"], *paraphrases(self.case)]
