"""Facts: all that a report says of an unlearning run, as one plain mapping; pages and programs read the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from torch_simu._hashes import sha256_of_hashes
from torch_simu.unlearning.report.result import MEASURES, MethodResult
from torch_simu.unlearning.report.verdict import judge

_Figure = Callable[[MethodResult], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What is known of a run when it ends; no text of any row is among it.

    Args:
        model: Folder or name of the model that was given.
        sets: Set -> the file or data set it comes from.
        rows: Set -> how many rows it has.
        hashes: Set -> keyed hash of its rows.
        key_file: The file that holds the key.
        by: What did it: "version", "method" and so on, with plain values.
        before_tensors: Tensor -> sha256, of the model as it was.
        after_tensors: Tensor -> sha256, of the model that is written.
        trained: Layer -> how many of its neurons trained, of how many; empty where whole weights did.
        trained_rows: Projection -> how many of its rows trained, of how many, where what makes the neurons did.
        before: The figures of the model as it was.
        after: Those of the model that forgot.
        reference: Those of a model that never saw the rows.
        target: The mean forget probability that was asked for.
        attacks: Attack -> "what" it does, "rows_taught" and "rows_scored", and "skipped" where it was and why.
        codes: Whether the folder holds the codes of a quantized base, with what forgets beside them.
        when: When the run ended; None: now.
    """

    model: str
    sets: Mapping[str, str]
    rows: Mapping[str, int]
    hashes: Mapping[str, str]
    key_file: str
    by: Mapping[str, object]
    before_tensors: Mapping[str, str]
    after_tensors: Mapping[str, str]
    trained: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    trained_rows: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    before: MethodResult
    after: MethodResult
    reference: MethodResult | None = None
    target: float | None = None
    attacks: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    codes: bool = False
    when: str | None = None

    def to_json(self) -> dict[str, object]:
        """Return the facts under the names that `report.json` has them by, "summary"."""
        made = {name: str(each["what"]) for name, each in self.attacks.items() if "skipped" not in each}
        verdict = judge(self.after, before=self.before, reference=self.reference, target=self.target, attacks=made)
        return {
            "verdict": verdict.to_json(),
            "sets": {
                name: {"file": Path(source).name, "rows": self.rows[name], "hmac_sha256": self.hashes[name]}
                for name, source in self.sets.items()
            },
            "key_file": self.key_file,
            "model": {"name": _named(self.model), "sha256": sha256_of_hashes(self.before_tensors)},
            "when": now() if self.when is None else self.when,
            "by": dict(self.by),
            "changed": self._changed(),
            "forgotten": {
                "target": self.target,
                "measures": self._measures("forget"),
                "membership": self._beside(lambda result: result.membership),
                "attacks": {name: dict(each) | self._attacked(name) for name, each in self.attacks.items()},
            },
            "cost": {
                "sets": {name: self._measures(name) for name in self.sets if name not in ("forget", "unseen")},
                "largest_loss": self._largest_loss(),
                "steps": self.after.steps,
                "seconds": None if self.after.seconds is None else round(self.after.seconds, 3),
                "optimizer_bytes": self.after.optimizer_bytes,
            },
            "remains": self._remains(),
            "limits": self._limits(),
        }

    def _changed(self) -> dict[str, object]:
        before, after = self.before_tensors, self.after_tensors
        names = dict.fromkeys([*before, *after])
        same = {name: before[name] for name in names if name in after and before.get(name) == after[name]}
        differ = {
            name: {"before": before.get(name), "after": after.get(name), **self._selected(name)}
            for name in names
            if name not in same
        }
        return {
            "share": self.after.changed_share,
            "num_changed": len(differ),
            "num_unchanged": len(same),
            "sha256": sha256_of_hashes(after),
            "layers": _counted(self.trained),
            **({"rows": _counted(self.trained_rows)} if self.trained_rows else {}),
            "changed": differ,
            "unchanged": same,
        }

    def _selected(self, tensor: str) -> dict[str, int]:
        layer = tensor.rpartition(".")[0]
        for key, counts in (("neurons", self.trained), ("rows", self.trained_rows)):
            if layer in counts:
                return {key: counts[layer][0], "of": counts[layer][1]}
        return {}

    def _measures(self, name: str) -> dict[str, dict[str, float]]:
        known = [key for key in MEASURES if key in self.before.sets[name] and key in self.after.sets[name]]
        return {key: self._beside(partial(_of_set, name, key)) for key in known}

    def _beside(self, figure: _Figure) -> dict[str, float]:
        models = {"before": self.before, "after": self.after, "reference": self.reference}
        found = {name: figure(result) for name, result in models.items() if result is not None}
        return {name: value for name, value in found.items() if value is not None}

    def _attacked(self, attack: str) -> dict[str, object]:
        if "skipped" in self.attacks[attack]:
            return {}
        return {key: self._beside(partial(_of_attack, attack, key)) for key in ("probability", "es")}

    def _largest_loss(self) -> dict[str, object] | None:
        losses = [
            (self.before.sets[name][key] - self.after.sets[name][key], name, key)
            for name in self.sets
            if name not in ("forget", "unseen")
            for key in self._measures(name)
        ]
        if not losses:
            return None
        loss, name, key = max(losses)
        return {
            "set": name,
            "measure": key,
            "before": self.before.sets[name][key],
            "after": self.after.sets[name][key],
            "loss": loss,
        }

    def _remains(self) -> list[str]:
        base = _named(self.model)
        copies = (
            "Backups, downloads and caches of it, and models that were made from it (fine-tuned, merged, distilled), "
            "know the rows as well; nothing here reaches them."
        )
        quantized = (
            "The weights in this folder are the untouched quantized base, which still knows the rows: only "
            "deltas.safetensors beside them makes it forget, and a loader that does not read that file opens the base. "
            "For a model that forgets in any loader, call with --save-as float."
            if self.codes
            else "Quantized copies of the base know the rows, too. Make them anew from this folder, and measure them: "
            "rounding can bring back what was forgotten."
        )
        return [
            f"The model that was given, {base}, still knows the rows in full. To erase them, delete it; else protect "
            "it as you protect the rows.",
            copies,
            "A patch of this change (torch-simu patch create) takes it back to the last bit, for whoever has this "
            "model. Delete or protect it like the base; selection.safetensors and attribution.safetensors say which "
            "neurons held the rows.",
            quantized,
            f"The rows themselves ({Path(self.sets['forget']).name}), and the key {self.key_file}: keep the key, away "
            "from this report, as long as you want to prove which rows were meant. Without it the hashes say nothing.",
        ]

    def _limits(self) -> list[str]:
        attacked = [name for name, each in self.attacks.items() if "skipped" not in each]
        return [
            "The figures are means over the rows as they are worded in the file. Other wordings, other languages and "
            "what can be concluded from the rows were not measured, and a single row may lie above a mean.",
            "The weights were changed until the figures fell. That is no proof that nothing is left: only a model that "
            "was trained without the rows never had them.",
            f"Attacks were made as listed ({', '.join(attacked)}); a stronger one may bring back more."
            if attacked
            else "No attack was made. Relearning some rows often brings back others: call with --attack to see.",
            "The limits are relative to the reference model that was given; they are as good as it is."
            if self.reference is not None
            else "There was no reference model, so the limits are conventions of this report.",
            "What was kept was measured on the sets above only; other knowledge and skills may have changed.",
            "This report is not signed: who can write its files can write other hashes into them.",
        ]


def _counted(counts: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
    return {layer: {"trained": some, "of": many} for layer, (some, many) in counts.items()}


def _of_set(name: str, key: str, result: MethodResult) -> float | None:
    return result.sets.get(name, {}).get(key)


def _of_attack(name: str, key: str, result: MethodResult) -> float | None:
    return (result.attack or {}).get(name, {}).get(key)


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _named(model: str) -> str:
    # A path says where the owner keeps things; a name on the hub has no folder to leave out.
    return Path(model).resolve().name if Path(model).exists() else model
