"""torch-simu patch: make, apply, take back, verify and show patches of checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from torch_simu._files import check_replaceable
from torch_simu.cli.commands.help import examples, show_help
from torch_simu.cli.console import say
from torch_simu.neurons import NeuronSelection
from torch_simu.patch import (
    Audit,
    NeuronPatch,
    apply_to_checkpoint,
    patch_between_checkpoints,
    revert_checkpoint,
    verify_checkpoint,
)

app = typer.Typer(rich_markup_mode=None)

_PATCH = "forget.safetensors"

PatchFile = Annotated[Path, typer.Argument(help="File of the patch.")]
Base = Annotated[Path, typer.Argument(help="Folder of the checkpoint before.")]
Changed = Annotated[Path, typer.Argument(help="Folder of the checkpoint after.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file, if it is an earlier result.")]
OutFolder = Annotated[Path, typer.Argument(help="New folder for the result.")]


@app.callback(
    invoke_without_command=True,
    epilog=examples(
        f"torch-simu patch create MODEL_DIR OUT_DIR OUT_DIR/selection.safetensors {_PATCH}",
        f"torch-simu patch apply {_PATCH} MODEL_DIR PATCHED_DIR",
        f"torch-simu patch verify {_PATCH} MODEL_DIR PATCHED_DIR",
    ),
)
def _about(context: typer.Context) -> None:
    """Patches: the change of a model as a file."""
    show_help(context)


@app.command(
    epilog=examples(f"torch-simu patch create MODEL_DIR OUT_DIR OUT_DIR/selection.safetensors {_PATCH} --force")
)
def create(
    base: Base,
    model: Changed,
    selection: Annotated[Path, typer.Argument(help="File of the selected neurons.")],
    out: Annotated[Path, typer.Argument(help="File for the patch.")],
    whole: Annotated[
        str | None, typer.Option(help="Regular expression for tensors that may differ as a whole, attention say.")
    ] = None,
    units: Annotated[
        bool, typer.Option("--units", help="The gate and up rows that make the neurons may differ, too.")
    ] = False,
    force: Force = False,
) -> None:
    """Write what differs between two checkpoints, and refuse if anything but the selected neurons does."""
    check_replaceable(out, ours=NeuronPatch.is_file(out), force=force)
    provenance = {"base": base.resolve().name, "model": model.resolve().name}
    chosen = NeuronSelection.load(selection)
    patch = patch_between_checkpoints(base, model, chosen, whole=whole, units=units, provenance=provenance)
    patch.save(out)
    say(Console(), f"{patch}: {out}")


@app.command(epilog=examples(f"torch-simu patch apply {_PATCH} MODEL_DIR APPLIED_DIR"))
def apply(patch: PatchFile, base: Base, out: OutFolder) -> None:
    """Write a copy of a checkpoint with the change in it; the base is only read."""
    apply_to_checkpoint(NeuronPatch.load(patch), base, out)
    say(Console(), f"Patched: {out}")


@app.command(epilog=examples(f"torch-simu patch revert {_PATCH} OUT_DIR REVERTED_DIR"))
def revert(patch: PatchFile, model: Changed, out: OutFolder) -> None:
    """Write a copy of a checkpoint without the change."""
    revert_checkpoint(NeuronPatch.load(patch), model, out)
    say(Console(), f"Reverted: {out}")


@app.command(epilog=examples(f"torch-simu patch verify {_PATCH} MODEL_DIR OUT_DIR --out audit.json"))
def verify(
    patch: PatchFile,
    base: Base,
    model: Changed,
    out: Annotated[Path | None, typer.Option(help="File for the audit, as JSON.")] = None,
    force: Force = False,
) -> None:
    """Prove by hash that the patch, and nothing else, lies between two checkpoints; exit status 1 if not."""
    if out is not None:
        check_replaceable(out, ours=Audit.is_file(out), force=force)
    audit = verify_checkpoint(NeuronPatch.load(patch), base, model).named(patch=patch.name)
    if out is not None:
        audit.save(out)
    say(Console(), audit)
    if not audit:
        sys.exit(1)


@app.command(epilog=examples(f"torch-simu patch show {_PATCH}"))
def show(patch: PatchFile) -> None:
    """List what a patch changes."""
    found = NeuronPatch.load(patch)
    console = Console()
    say(console, found)
    for key, value in found.provenance.items():
        say(console, f"{key}: {value}")
    for name, change in found.changes.items():
        what = "rows" if change.of_rows else "neurons"
        neurons = f"{len(change.neurons)} of {change.num_neurons} {what}" if change.num_neurons else "all"
        line = f"{name}  {change.kind}  {neurons}  {change.dtype}  {change.before[:12]} -> {change.after[:12]}"
        say(console, line, soft_wrap=True)
