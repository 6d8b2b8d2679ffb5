"""Recording: what the report of `unlearn` says beside its table, gathered while the job runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_simu._files import check_writable_file
from torch_simu._hashes import sha256_of
from torch_simu.cli.attack.attacking import Attacking, worst_of
from torch_simu.cli.loading import Loading
from torch_simu.cli.measuring import UNSEEN, Measuring, Sources
from torch_simu.cli.reference import read_reference
from torch_simu.deltas import attached_layers
from torch_simu.layers import d_model, sources_beside
from torch_simu.neurons import NeuronSelection
from torch_simu.patch.model import tensors_of
from torch_simu.unlearning.attack.config import ATTACKS, AttackConfig
from torch_simu.unlearning.attack.result import AttackResult
from torch_simu.unlearning.config import UnlearnConfig
from torch_simu.unlearning.data.examples import encode
from torch_simu.unlearning.data.rows import Row
from torch_simu.unlearning.data.tokenizer import pad_id
from torch_simu.unlearning.driver import Unlearned
from torch_simu.unlearning.metrics.membership import membership_auc
from torch_simu.unlearning.metrics.scoring import score_answers
from torch_simu.unlearning.progress import Progress
from torch_simu.unlearning.report.facts import RunFacts
from torch_simu.unlearning.report.keyed import keyed_hash, new_key, read_key, write_key
from torch_simu.unlearning.report.report import MethodResult, package_version


def tensor_hashes(model: PreTrainedModel) -> dict[str, str]:
    """Return the sha256 of each tensor of a model, of quantized layers that of codes and scales, and of each delta."""
    deltas = {
        f"{name}.{key}": delta
        for name, layer in attached_layers(model).items()
        for key, delta in layer.deltas().items()
    }
    return {name: sha256_of(tensor) for name, tensor in {**tensors_of(model), **deltas}.items()}


@dataclass(frozen=True, slots=True)
class RowKey:
    """The key under which a report names rows, and the file that holds it.

    Args:
        path: The file; a new one is written by `save`.
        key: What it holds, or will.
    """

    path: Path
    key: str = field(repr=False)

    @classmethod
    def beside(cls, out: Path, given: Path | None = None) -> RowKey:
        """Return the key in the file that was given, else in `OUT.key` beside a result; a new one where there is none.

        Raises:
            ValueError: If the file holds no key.
            OSError: If the file could not be written.
        """
        path = out.absolute().with_name(f"{out.absolute().name}.key") if given is None else given
        if path.exists():
            return cls(path, read_key(path))
        if given is not None:
            check_writable_file(path)
        return cls(path, new_key())

    def hashes(self, rows: Mapping[str, Sequence[Row]]) -> dict[str, str]:
        """Return the keyed hash of each set."""
        return {name: keyed_hash(part, self.key) for name, part in rows.items()}

    def save(self) -> None:
        """Write the key, unless its file is there."""
        if not self.path.exists():
            write_key(self.path, self.key)


@dataclass(frozen=True, slots=True)
class Recording:
    """How the models of `unlearn` are measured and attacked, and what their report says of it.

    Args:
        name: Folder or name of the model that is to forget.
        sets: Set -> its file or data set, "unseen" perhaps among them.
        rows: Set -> its rows.
        key: Under which the report names the rows.
        loading: How models are loaded.
        measuring: How the sets are measured.
        attack: How the models are attacked; None: they are not.
        progress: Told of each stage.
    """

    name: str
    sets: Sources
    rows: Mapping[str, Sequence[Row]]
    key: RowKey
    loading: Loading
    measuring: Measuring
    attack: AttackConfig | None = None
    progress: Progress | None = None

    @property
    def measured(self) -> dict[str, Sequence[Row]]:
        """The sets that a report has figures of."""
        return {name: part for name, part in self.rows.items() if name != UNSEEN}

    def of(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        when: str,
        done: Unlearned | None = None,
    ) -> tuple[MethodResult, dict[str, AttackResult] | None]:
        """Measure and attack a model.

        Args:
            model: It is only read.
            tokenizer: The model's.
            when: What `progress` is told: "before", "after", "reference".
            done: The run that it comes from.
        """
        sets = self.measuring.measures(model, tokenizer, self.measured, f"evaluate {when}", self.progress)
        length = self.measuring.max_length
        found = Attacking(self.attack, tokenizer, self.rows, length, self.progress).on(model, when)
        attack, told = worst_of(found), None
        if UNSEEN in self.rows:
            known, unseen = (
                score_answers(
                    model,
                    encode(self.rows[name], tokenizer, max_length=length),
                    batch_size=self.measuring.batch_size,
                    pad_id=pad_id(tokenizer, model),
                )["probability"]
                for name in ("forget", UNSEEN)
            )
            told = membership_auc(known, unseen)
        if done is None:
            return MethodResult(sets, 0.0, 0, 0.0, 0, attack, told), found
        cost = (done.changed_share, done.optimizer_bytes, done.seconds, done.steps)
        return MethodResult(sets, *cost, attack, told), found

    def of_reference(self, reference: str | None) -> MethodResult | None:
        """Return the figures of a reference, a model that never saw the rows, or what `evaluate --out` wrote of it."""
        if reference is None:
            return None
        if Path(reference).is_file():
            sets = {name: self.sets[name] for name in ("forget", "retain")}
            settings: dict[str, object] = {
                "sets": sets,
                "rows": {name: len(self.rows[name]) for name in sets},
                "suite": None,
                "max_length": self.measuring.max_length,
                "max_new_tokens": self.measuring.max_new_tokens,
            }
            if self.attack is not None:
                settings["attack"] = self.attack.to_json()
            return read_reference(Path(reference), settings)[0]
        model, tokenizer = self.loading.load(reference)
        result, _ = self.of(model, tokenizer, "reference")
        return MethodResult(result.sets, attack=result.attack, membership=result.membership)

    def summary(
        self,
        model: PreTrainedModel,
        done: Unlearned,
        config: UnlearnConfig,
        *,
        before: MethodResult,
        after: MethodResult,
        reference: MethodResult | None,
        attacks: Mapping[str, AttackResult] | None,
        before_tensors: Mapping[str, str],
        save_as: str,
    ) -> dict[str, object]:
        """Return what the report says beside its table; see `torch_simu.unlearning.report.facts.RunFacts`.

        Args:
            model: As it will be written.
            done: The run.
            config: Its choices.
            before: The figures of the model as it was.
            after: Those of `model`.
            reference: Those of a model that never saw the rows.
            attacks: What each attack on `model` came to.
            before_tensors: Hashes of the model as it was, from `tensor_hashes`.
            save_as: How it will be written.
        """
        by = {
            "version": package_version("torch-simu"),
            "method": config.method,
            "objective": config.objective,
            "seed": config.seed,
            "dtype": self.loading.dtype,
            "load_in": self.loading.load_in or "as saved",
            "save_as": save_as,
            "batch_size": self.measuring.batch_size,
            "max_length": self.measuring.max_length or "as the rows are",
        }
        told = {
            name: {
                "what": ATTACKS[name],
                "rows_taught": each.num_taught,
                "rows_scored": each.num_scored,
                **({"skipped": each.skipped} if each.skipped else {}),
            }
            for name, each in (attacks or {}).items()
        }
        return RunFacts(
            model=self.name,
            sets=self.sets,
            rows={name: len(part) for name, part in self.rows.items()},
            hashes=self.key.hashes(self.rows),
            key_file=self.key.path.name,
            by=by,
            before_tensors=before_tensors,
            after_tensors=tensor_hashes(model),
            trained=_trained(done.selection),
            trained_rows=_trained_rows(model, done.selection) if config.units else {},
            before=before,
            after=after,
            reference=reference,
            target=config.forget_target,
            attacks=told,
            codes=bool(attached_layers(model)),
        ).to_json()


def _trained_rows(model: PreTrainedModel, selection: NeuronSelection | None) -> dict[str, tuple[int, int]]:
    """Return projection -> how many of its rows make selected neurons, of how many."""
    made = {} if selection is None else sources_beside(model, [layer for layer in selection if len(selection[layer])])
    return {
        source.name: (source.num_parts * len(cast("NeuronSelection", selection)[layer]), d_model(source.layer))
        for layer, sources in made.items()
        for source in sources
    }


def _trained(selection: NeuronSelection | None) -> dict[str, tuple[int, int]]:
    if selection is None:
        return {}
    return {layer: (len(selection[layer]), selection.num_neurons[layer]) for layer in selection}
