"""AttackConfig: every choice of an attack, and the names of the attacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch_simu._checks import check_choice, check_count, check_number, problem

ATTACKS: Mapping[str, str] = MappingProxyType(
    {
        "relearn": "AdamW on a part of the forget rows",
        "relearn_low_rank": "the same with LoRA matrices beside the layers, at ten times the rates",
        "fine_tune": "AdamW on retain rows",
        "fine_tune_text": "AdamW on rows of plain text",
        "round_8bit": "all matrices rounded to 8 bits, with a scale for each row",
        "round_4bit": "all matrices rounded to 4 bits, with a scale for each block",
        "few_shots": "a few forget rows before each prompt",
    }
)
"""Name of an attack -> what it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackConfig:
    """Every choice of an attack. The attacker knows every `attacker_every`-th forget row; the others are scored.

    Args:
        rates: Learning rates of AdamW; each is a run of its own, from the same weights.
        steps: Steps of each run.
        interval: Steps between two measurements of the scored rows; the last step is measured, too.
        batch_size: Rows per step, or all that there are.
        attacker_every: Of so many rows in their order the first is the attacker's.
        rank: Inner dimension of LoRA matrices.
        shots: Rows before each prompt.
        eval_batch_size: Rows per forward pass of a measurement.
        float32: Whether weights of half precision are attacked in float32, as one who relearns would do: small steps
            are lost to rounding otherwise, and the attack looks weaker than it is.
        seed: Of the batches and of the shots.

    Raises:
        ValueError: If a value is out of bounds.
        TypeError: If a value has a wrong type.

    Examples:
        >>> AttackConfig(rates=[1e-4]).rates
        (0.0001,)
    """

    rates: Sequence[float] = (1e-5, 1e-4, 1e-3)
    steps: int = 40
    interval: int = 5
    batch_size: int = 16
    attacker_every: int = 3
    rank: int = 8
    shots: int = 5
    eval_batch_size: int = 32
    float32: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.rates, str) or not isinstance(self.rates, Sequence) or not self.rates:
            raise ValueError(problem(f"rates is {self.rates!r}", "at least one learning rate, (1e-5, 1e-4) say"))
        for number, rate in enumerate(self.rates):
            check_number(f"rates[{number}]", rate, low_open=True)
        object.__setattr__(self, "rates", tuple(self.rates))
        for name in ("steps", "interval", "batch_size", "rank", "shots", "eval_batch_size"):
            check_count(name, getattr(self, name))
        check_count("attacker_every", self.attacker_every, low=2)
        check_count("seed", self.seed, low=0)
        if not isinstance(self.float32, bool):
            raise TypeError(problem(f"float32 is {self.float32!r}", "True or False"))

    def to_json(self) -> dict[str, object]:
        """Return the values as JSON knows them."""
        return {**dataclasses.asdict(self), "rates": list(self.rates)}


def chosen_attacks(attacks: Sequence[str] | None, *, retain: bool, text: bool) -> tuple[str, ...]:
    """Return the attacks to make, in the order of `ATTACKS`.

    Args:
        attacks: Their names; None: all that there are rows for.
        retain: Whether there are retain rows.
        text: Whether there are rows of plain text.

    Raises:
        ValueError: If there is none, a name is unknown, or an attack has no rows.

    Examples:
        >>> chosen_attacks(None, retain=False, text=False)
        ('relearn', 'relearn_low_rank', 'round_8bit', 'round_4bit', 'few_shots')
    """
    lacking = {"fine_tune": "retain"} if not retain else {}
    lacking |= {"fine_tune_text": "text"} if not text else {}
    if attacks is None:
        return tuple(name for name in ATTACKS if name not in lacking)
    if isinstance(attacks, str) or not attacks:
        raise ValueError(problem(f"attacks is {attacks!r}", f"names among {', '.join(ATTACKS)}"))
    for name in attacks:
        check_choice("attack", name, tuple(ATTACKS))
        if name in lacking:
            raise ValueError(problem(f"The attack {name!r} has no {lacking[name]} rows", "at least one"))
    return tuple(name for name in ATTACKS if name in attacks)
