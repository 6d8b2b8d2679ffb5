"""attack_model: what several attacks bring back of a forget set, measured on rows that the attacker has not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from transformers import PreTrainedModel

from torch_simu.unlearning.attack.config import AttackConfig, chosen_attacks
from torch_simu.unlearning.attack.copies import ModelCopy
from torch_simu.unlearning.attack.low_rank import check_peft, why_not
from torch_simu.unlearning.attack.result import AttackPoint, AttackResult, measure_scored
from torch_simu.unlearning.attack.rounding import rounded_to_4_bits, rounded_to_8_bits
from torch_simu.unlearning.attack.rows import check_unscored, split_rows, with_shots
from torch_simu.unlearning.attack.teaching import brought_back, teach
from torch_simu.unlearning.data.examples import Example
from torch_simu.unlearning.data.fits import check_fits, num_positions
from torch_simu.unlearning.progress import Progress

_ROUNDINGS = MappingProxyType({"round_8bit": rounded_to_8_bits, "round_4bit": rounded_to_4_bits})
_LOW_RANK = "relearn_low_rank"
_CODES = "its weights are codes already"
_DIVERGED = "the gradient is not finite at any rate before the first measurement"
_NO_ROOM = "no row fits before another one"


def attack_model(
    model: PreTrainedModel,
    forget: Sequence[Example],
    retain: Sequence[Example] = (),
    *,
    attacks: Sequence[str] | None = None,
    text: Sequence[Example] = (),
    config: AttackConfig | None = None,
    pad_id: int = 0,
    progress: Progress | None = None,
) -> dict[str, AttackResult]:
    """Attack a copy of a model, and measure what comes back of the forget rows that the attacker does not have.

    The model is only read: it is the same to the last bit afterwards, also when this raises. All attacks share one
    copy. Of a quantized model the attacker trains the deltas and what weights are floats, and no rounding is made.
    The same arguments give the same figures; the global generator is not used.

    Args:
        model: A causal language model, with deltas or without.
        forget: Encoded rows that were forgotten, at least two different ones.
        retain: Encoded rows for the attack "fine_tune".
        attacks: Names of `ATTACKS`; None: all that there are rows for.
        text: Encoded rows for the attack "fine_tune_text", any that are not scored.
        config: Every choice.
        pad_id: The token id to pad with.
        progress: Told of a stage for each attack.

    Returns:
        Name -> what the attack came to, in the order of `ATTACKS`.

    Raises:
        ImportError: If "relearn_low_rank" is named and PEFT is not installed; where it is not named, it is skipped.
        ValueError: If the forget set has fewer than two different rows, an attack is unknown or has no rows, a scored
            row is taught, or a weight of the model has no data or was packed for inference.
        DataError: If a row does not fit into the model.
    """
    config = AttackConfig() if config is None else config
    names = chosen_attacks(attacks, retain=bool(retain), text=bool(text))
    attacker, scored = split_rows(forget, every=config.attacker_every)
    learned = {"relearn": attacker, _LOW_RANK: attacker}
    taught = {**learned, "fine_tune": list(retain), "fine_tune_text": list(text)}
    if attacks is not None and _LOW_RANK in names:
        check_peft()
    for name in names:
        check_unscored(taught.get(name, []), scored)
    for rows in (scored, *taught.values()):
        check_fits(model, rows)
    copied = ModelCopy(model, float32=config.float32)
    measure = partial(measure_scored, copied.model, batch_size=config.eval_batch_size, pad_id=pad_id)
    before = measure(scored)
    found: dict[str, AttackResult] = {}
    for name in names:
        copied.restore()
        trace: list[AttackPoint] = []
        count, skipped = len(attacker), ""
        total = config.steps * len(config.rates) if name in taught else 1
        told = _told(progress, f"attack {name}", total)
        if name == _LOW_RANK and (lacking := why_not(copied.model)):
            skipped = lacking
        elif name in taught:
            count = len(taught[name])
            rank = config.rank if name == _LOW_RANK else None
            trace = teach(copied, taught[name], scored, config=config, pad_id=pad_id, rank=rank, told=told)
            skipped = "" if trace else _DIVERGED
        elif name in _ROUNDINGS:
            count = 0
            if copied.quantized:
                skipped = _CODES
            else:
                copied.round_weights(_ROUNDINGS[name])
                trace = [measure(scored)]
        else:
            longest = num_positions(copied.model)
            prompted = with_shots(scored, attacker, shots=config.shots, seed=config.seed, longest=longest)
            if prompted == scored:
                skipped = _NO_ROOM
            else:
                trace = [measure(prompted)]
        told(total, brought_back(trace))
        found[name] = AttackResult(before, tuple(trace), len(scored), count, skipped)
    return found


def _told(progress: Progress | None, stage: str, total: int) -> Callable[[int, str], None]:
    return lambda done, note: None if progress is None else progress(stage, done, total, note)


def relearning(results: Mapping[str, AttackResult], *, reference: float | None = None) -> str:
    """Say in a sentence what relearning brings back; nothing where that attack was not made.

    Args:
        results: What `attack_model` returned.
        reference: What it brings back of a model that never saw the rows, where that is known.

    Examples:
        >>> found = AttackResult(AttackPoint(0.05, 0.0), (AttackPoint(0.6, 0.5, 1e-4, 5),), 14, 7)
        >>> relearning({"relearn": found}, reference=0.02)
        'Relearning 7 rows brings the other 14 back to a probability of 0.600 (without: 0.050; reference: 0.020).'
    """
    found = results.get("relearn")
    if found is None or found.skipped:
        return ""
    beside = "" if reference is None else f"; reference: {reference:.3f}"
    return (
        f"Relearning {found.num_taught} row{'' if found.num_taught == 1 else 's'} brings the other {found.num_scored} "
        f"back to a probability of {found.probability:.3f} (without: {found.before.probability:.3f}{beside})."
    )
