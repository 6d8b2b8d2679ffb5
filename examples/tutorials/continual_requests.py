"""Serve two erasure requests one after the other, and see what the second does to the first."""

# --8<-- [start:imports]
from __future__ import annotations

import copy

from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.demo.demo import DemoRecipe, make_fiction, train_base
from torch_simu.unlearning.demo.memorize import TrainConfig
from torch_simu.unlearning.driver import unlearn
from torch_simu.unlearning.metrics.scoring import score_answers

# --8<-- [end:imports]

# --8<-- [start:model]
# topic_share=0.5: those who are to be forgotten differ from all others in nothing but their names.
training = TrainConfig(epochs=60, lr=4e-3, batch_size=16)
recipe = DemoRecipe(
    num_forget=6, retain_per_forget=2, num_places=6, topic_share=0.5, d_model=64, d_ff=256, training=training
)
fiction = make_fiction(recipe, seed=0)
model = train_base(fiction, recipe, seed=0, sets=["forget", "retain", "world"])


def person(row: Row) -> str:
    """Return the name in a question."""
    return " ".join(word.strip("?") for word in row.question.split()[1:] if word[0].isupper())


early = sorted({person(row) for row in fiction.rows["forget"]})[:3]
requests = {"first": [], "second": []}
for row, example in zip(fiction.rows["forget"], fiction.examples["forget"], strict=True):
    requests["first" if person(row) in early else "second"].append(example)
first, second, retain = requests["first"], requests["second"], fiction.examples["retain"]


def tell(when: str) -> list[float]:
    """Print and return the mean answer probability of both requests and the retain set."""
    scores = [score_answers(model, rows)["probability"] for rows in (first, second, retain)]
    means = [sum(each) / len(each) for each in scores]
    print("{}: first {:.2f}, second {:.2f}, retain {:.2f}".format(when, *means))
    return means


tell("before")
# --8<-- [end:model]

# --8<-- [start:alone]
unlearn(model, first, retain, config=UnlearnConfig(forget_target=0.1))
once = tell("after the first request")
served = copy.deepcopy(model)
unlearn(model, second, retain, config=UnlearnConfig(forget_target=0.1))
alone = tell("after the second request, its own rows only")
assert alone[0] > 1.3 * once[0]
# --8<-- [end:alone]

# --8<-- [start:together]
model = served
unlearn(model, first + second, retain, config=UnlearnConfig(forget_target=0.06))
together = tell("after the second request, with the rows of the first")
assert max(together[:2]) <= 0.11
assert together[2] > 0.9
# --8<-- [end:together]
