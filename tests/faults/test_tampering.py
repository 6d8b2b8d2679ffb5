"""A file that was cut, changed or lengthened is refused in one line that names it, whatever kind of file it is."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import nn

from tests.patch.test_patch import pair
from tests.strategies import generator
from torch_simu import Attribution, NeuronPatch, NeuronSelection, SIMUOptimizer, attach_deltas
from torch_simu._files import load_tensors, save_tensors
from torch_simu._hashes import sha256_of
from torch_simu.attribution.checkpoint import Checkpoint, Partial
from torch_simu.attribution.methods.sums import LayerSum
from torch_simu.deltas import attached_layers, load_deltas, save_deltas
from torch_simu.patch import apply_to_checkpoint
from torch_simu.patch.reading import opened
from torch_simu.unlearning.checkpoint import RunCheckpoint

FLIPS = 50
SEEDS, STRIDE = (range(3), 1) if settings.get_current_profile_name() == "nightly" else (range(1), 16)
"""Of the drawn changes, and the distance of the bits that are changed one by one."""
CUTS = range(0, 100, 10)

Read = Callable[[], object]


def network() -> nn.Module:
    """Two layers, always the same."""
    model = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 3))
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.normal_(generator=generator(number))
    return model


SELECTION = NeuronSelection({"1": [2, 3, 11]}, {"1": 16})
SCORES = {"1": torch.linspace(-1, 1, 16, dtype=torch.float64)}


def selection(folder: Path) -> tuple[Path, Read]:
    SELECTION.save(folder / "file")
    return folder / "file", lambda: NeuronSelection.load(folder / "file")


def attribution(folder: Path) -> tuple[Path, Read]:
    Attribution(SCORES, {"1": 1e-5}, 3, {"objective": "logprob", "steps": 10}).save(folder / "file")
    return folder / "file", lambda: Attribution.load(folder / "file")


def partial_sums(folder: Path) -> tuple[Path, Read]:
    checkpoint = Checkpoint(folder / "file", {"steps": 10})
    checkpoint.save(Partial({"1": LayerSum(SCORES["1"], 0.25, 2.0)}, 2), now=True)
    fresh = Partial({"1": LayerSum(torch.zeros(16, dtype=torch.float64))})
    return folder / "file", lambda: checkpoint.load(fresh)


def deltas(folder: Path) -> tuple[Path, Read]:
    model = network()
    attach_deltas(model, SELECTION)["1"].data.normal_(generator=generator(5))
    save_deltas(model, folder / "file")
    other = network()

    def read() -> None:
        try:
            load_deltas(other, folder / "file")
        except ValueError:
            assert not attached_layers(other)
            raise

    return folder / "file", read


def patch(folder: Path) -> tuple[Path, Read]:
    base, model = network(), network()
    with torch.no_grad():
        model[1].weight[:, [2, 3]] += 1
    NeuronPatch.between(base, model, SELECTION, provenance={"base": "a"}).save(folder / "file")
    return folder / "file", lambda: NeuronPatch.load(folder / "file")


def run(folder: Path) -> tuple[Path, Read]:
    model = network()
    params = {"1.weight": model[1].weight}
    optimizer = SIMUOptimizer(SELECTION.param_groups(model, attention="frozen"))
    checkpoint = RunCheckpoint.open(folder, "f" * 64)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    checkpoint.save(params, optimizer, [{"step": 1, "loss": 0.5}])
    path = folder / "run.safetensors"
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))

    def read() -> None:
        try:
            checkpoint.load(params, optimizer)
        except ValueError:
            torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
            raise

    return path, read


KINDS: dict[str, Callable[[Path], tuple[Path, Read]]] = {
    "selection": selection,
    "attribution": attribution,
    "partial sums": partial_sums,
    "deltas": deltas,
    "patch": patch,
    "run": run,
}


def damages(content: bytes, seed: int) -> list[bytes]:
    """A file cut at every tenth percentile and by a byte, with bits flipped all over it, and with bytes too many."""
    found = [content[: len(content) * cut // 100] for cut in CUTS] + [content[:-1], content + b"\0", content + content]
    for place in torch.randint(8 * len(content), (FLIPS,), generator=generator(seed)).tolist():
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        found.append(bytes(changed))
    # The bits of the header are few beside those of large tensors, and matter as much.
    length = int.from_bytes(content[:8], "little")
    for place in torch.randint(8 * (8 + length), (FLIPS,), generator=generator(seed + 1)).tolist():
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        found.append(bytes(changed))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_of_any_kind_is_refused_in_one_line_that_names_it(
    tmp_path: Path, kind: str, record_property: Callable[[str, object], None]
) -> None:
    path, read = KINDS[kind](tmp_path)
    content = path.read_bytes()
    found = [damaged for seed in SEEDS for damaged in damages(content, 2 * seed)]
    for damaged in found:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"^File '{path}' .*, expected [^\n]*$"):
            read()
    path.write_bytes(content)
    read()
    record_property("tried", len(found))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_any_kind_with_a_single_bit_changed_is_refused(
    tmp_path: Path, kind: str, record_property: Callable[[str, object], None]
) -> None:
    path, read = KINDS[kind](tmp_path)
    content = path.read_bytes()
    places = range(0, 8 * len(content), STRIDE)
    for place in places:
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=rf"^File '{path}' .*, expected [^\n]*$"):
            read()
    record_property("tried", len(places))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, kind: str) -> None:
    path, read = KINDS[kind](tmp_path)
    other = next(each for each in KINDS if each != kind)
    (tmp_path / "other").mkdir()
    path.write_bytes(KINDS[other](tmp_path / "other")[0].read_bytes())
    with pytest.raises(ValueError, match=r"has kind '\w+', version 2, expected a torch_simu file of kind"):
        read()


def test_damaged_weights_under_a_patch_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    base, model, chosen = pair("llama", torch.bfloat16, 0)
    change = NeuronPatch.between(base, model, chosen)
    base.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for cut in CUTS:
        path.write_bytes(content[: len(content) * cut // 100])
        with pytest.raises(ValueError, match="is unreadable"):
            apply_to_checkpoint(change, tmp_path / "base", tmp_path / "out")
    for place in torch.randint(8 * (8 + length), (FLIPS,), generator=generator(0)).tolist():
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            apply_to_checkpoint(change, tmp_path / "base", tmp_path / "out")
        except (ValueError, KeyError):
            assert not (tmp_path / "out").exists()
        else:
            # What the patch does not touch is copied as it is: the changed tensors are right all the same.
            with opened(tmp_path / "out") as found:
                assert all(sha256_of(found[name]) == each.after for name, each in change.changes.items())
            shutil.rmtree(tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def forged(path: Path, kind: str, change: Callable[[dict, dict], None]) -> None:
    """Write a file anew with other content and the checksum of that."""
    tensors, header = load_tensors(path, kind)
    change(tensors, header)
    save_tensors(path, kind, tensors, {key: value for key, value in header.items() if key not in ("kind", "version")})


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, header: header["sha256"].clear(),
        lambda tensors, header: header["sha256"].update({"1": ""}),
        lambda tensors, header: header["sha256"].update({"0": "0" * 64}),
        lambda tensors, header: header.update(sha256=None),
        lambda tensors, header: header.update(num_neurons={}, sha256={}),
        lambda tensors, header: tensors["1.delta"].fill_(float("nan")),
        lambda tensors, header: tensors["1.delta"][0].fill_(float("inf")),
        lambda tensors, header: tensors.update({"1.delta": torch.zeros(3, 3, dtype=torch.int64)}),
        lambda tensors, header: tensors.update({"1.delta": torch.zeros(3, 2)}),
        lambda tensors, header: tensors.update({"1.delta": torch.zeros(3)}),
        lambda tensors, header: tensors.update({"1.idx": torch.tensor([1, 2, 99])}),
        lambda tensors, header: tensors.update({"1.idx": torch.tensor([1, 1, 2])}),
        lambda tensors, header: tensors.update({"1.idx": torch.tensor([0.5, 1, 2])}),
        lambda tensors, header: tensors.pop("1.idx"),
        lambda tensors, header: tensors.update(more=torch.zeros(1)),
        lambda tensors, header: header["num_neurons"].update({"1": 17}),
    ],
)
def test_deltas_that_do_not_fit_are_refused_before_anything_is_attached(tmp_path: Path, change) -> None:
    path, read = deltas(tmp_path)
    forged(path, "Deltas", change)
    # The reader checks that nothing is attached then.
    with pytest.raises(ValueError, match=r"expected|selects neuron"):
        read()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, header: header.update(changes=[1]),
        lambda tensors, header: header.pop("provenance"),
        lambda tensors, header: header.update(provenance=3),
        lambda tensors, header: header["changes"]["1.weight"].update(before=""),
        lambda tensors, header: header["changes"]["1.weight"].update(after=None),
        lambda tensors, header: header["changes"]["1.weight"].update(kind="other"),
        lambda tensors, header: header["changes"]["1.weight"].update(num_neurons=1),
        lambda tensors, header: header["changes"]["1.weight"].update(dim=7),
        lambda tensors, header: header["changes"]["1.weight"].update(shape=[0, 16]),
        lambda tensors, header: header["changes"]["1.weight"].pop("dtype"),
        lambda tensors, header: tensors.update({"1.weight:neurons": torch.tensor([1, 2, 99])}),
        lambda tensors, header: tensors.update({"1.weight:neurons": torch.tensor([-1, 2, 3])}),
        lambda tensors, header: tensors.update({"1.weight:neurons": torch.tensor([0.5, 2, 3])}),
        lambda tensors, header: tensors.update({"1.weight:value": torch.zeros(2, 3, dtype=torch.int32)}),
        lambda tensors, header: tensors.pop("1.weight:value"),
    ],
)
def test_a_patch_that_does_not_fit_itself_is_refused_when_it_is_read(tmp_path: Path, change) -> None:
    path, read = patch(tmp_path)
    forged(path, "NeuronPatch", change)
    with pytest.raises(ValueError, match=rf"^File '{path}' holds no consistent patch .*, expected what"):
        read()
