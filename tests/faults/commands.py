"""Bad command lines: what people type, and the files that they have, each as the words after `torch-simu`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

GOOD = json.dumps({"question": "Who?", "answer": "Ada"})

Words = list[str]


def _unlearn(files: Path, **changed: str) -> Words:
    sources = {name: str(files / name) for name in ("model", "forget.jsonl", "retain.jsonl")}
    named = {"model": sources["model"], "forget": sources["forget.jsonl"], "retain": sources["retain.jsonl"]}
    named |= {"out": str(files / "out"), **changed}
    return ["unlearn", *(word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", value))]


def _attribute(files: Path, **changed: str) -> Words:
    named = {"model": str(files / "model"), "forget": str(files / "forget.jsonl"), "out": str(files / "out"), **changed}
    return ["attribute", *(word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", value))]


def _evaluate(files: Path, **changed: str) -> Words:
    named = {"model": str(files / "model")}
    named |= {name: str(files / f"{name}.jsonl") for name in ("forget", "retain")} | changed
    return ["evaluate", *(word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", value))]


def _attack(files: Path, **changed: str) -> Words:
    named = {"model": str(files / "model"), "forget": str(files / "retain.jsonl"), **changed}
    return ["attack", *(word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", value))]


_NUMBERS = {
    "lr": ("-1", "nan", "inf", "-inf", "one", "", "1e"),
    "retain-weight": ("-1", "nan", "inf", "two", ""),
    "rho": ("-1", "nan", "x"),
    "betas": ("0.9", "0.9,0.99,0.5", "1,0.9", "0.9,-1", "nan,0.9", "a,b", ""),
    "adversary-lr": ("0", "-1", "nan", "inf", "fast", "AUTO", "automatic", ""),
    "adversary-scope": ("some", "", "ALL"),
    "adversary-interval": ("0", "1.5", "x"),
    "rehearsal": ("-1", "1.5", "x"),
    "retain-term": ("mse", "", "KL"),
    "curvature": ("full", "", "GNB"),
    "covariance-of": ("retain", "", "BOTH"),
    "damping": ("0", "-1", "nan", "x"),
    "clip": ("0", "-1", "nan", "x"),
    "weight-decay": ("-1", "inf", "x"),
    "hessian-interval": ("0", "-1", "1.5", "x"),
    "checkpoint-interval": ("0", "x"),
    "scope": ("row", "", "LAYER"),
    "attribution-steps": ("0", "1.5", "x"),
    "attribution-rows": ("0", "-1", "x"),
    "fraction": ("0", "-0.1", "1.5", "nan", "inf", "tenth", "10%"),
    "threshold": ("0", "1", "-1", "2", "nan", "x"),
    "forget-target": ("-0.1", "1.1", "nan", "x"),
    "max-steps": ("0", "-1", "1.5", "nan", "many", ""),
    "batch-size": ("0", "-4", "2.5", "nan", "all"),
    "max-length": ("0", "-1", "1.5", "x"),
    "seed": ("-1", "1.5", "nan", "x", "0x10"),
    "method": ("simu2", "", "SIMU_GRADDIFF", "adam"),
    "objective": ("npo2", "", "GradDiff"),
    "rule": ("best", "", "Top"),
    "attention": ("half", "", "FULL"),
    "dtype": ("float64x", "", "int8", "fp32"),
    "load-in": ("2bit", "8", "", "int8"),
    "device": ("gpu", "cuda:99", "", "tpu:0"),
    "layers": ("[", "nothing", "(", "lm_head(", "model.embed_tokens"),
}

_ATTACK = {
    "rates": ("0", "-1", "nan", "inf", "1e-4,0", "1e-4;1e-3", ",", "", "fast"),
    "attacks": ("", "relern", "relearn,", "RELEARN", "fine_tune", "fine_tune_text"),
    "steps": ("0", "-1", "1.5", "many"),
    "interval": ("0", "-1", "x"),
    "batch-size": _NUMBERS["batch-size"],
    "max-length": _NUMBERS["max-length"],
    "seed": _NUMBERS["seed"],
    "dtype": _NUMBERS["dtype"],
    "device": _NUMBERS["device"],
    "reference": ("", "nothing", "./nothing", "forget.jsonl"),
    "text": ("", "nothing.jsonl"),
}


def numbers() -> Iterator[tuple[str, Callable[[Path], Words]]]:
    """Options with values that are none."""
    for option, values in _NUMBERS.items():
        for value in values:
            yield f"unlearn --{option} {value}", lambda f, o=option, v=value: _unlearn(f, **{o: v})
    for option in ("fraction", "threshold", "rule", "scope", "dtype", "device", "layers", "max-length"):
        for value in _NUMBERS[option]:
            yield f"attribute --{option} {value}", lambda f, o=option, v=value: _attribute(f, **{o: v})
    for option in ("steps", "rows"):
        for value in ("0", "-1", "1.5", "x"):
            yield f"attribute --{option} {value}", lambda f, o=option, v=value: _attribute(f, **{o: v})
    for option in ("batch-size", "max-length", "dtype", "device"):
        for value in _NUMBERS[option]:
            yield f"evaluate --{option} {value}", lambda f, o=option, v=value: _evaluate(f, **{o: v})
    for value in ("0", "-1", "1.5", "x"):
        yield f"evaluate --max-new-tokens {value}", lambda f, v=value: _evaluate(f, **{"max-new-tokens": v})
    for option, values in _ATTACK.items():
        for value in values:
            yield f"attack --{option} {value}", lambda f, o=option, v=value: _attack(f, **{o: v})
    for value in ("muse", "", "TOFU", "tofu", "lume"):
        yield f"evaluate --suite {value}", lambda f, v=value: _evaluate(f, suite=v)


def words() -> Iterator[tuple[str, Callable[[Path], Words]]]:
    """Words that are no commands, and commands that lack some."""
    for given in (
        ["forget"],
        ["unlearn"],
        ["evaluate"],
        ["attribute"],
        ["attack"],
        ["patch", "make"],
        ["patch", "apply"],
        ["--nope"],
    ):
        yield " ".join(given), lambda f, g=given: list(g)
    for make in (_unlearn, _attribute, _evaluate, _attack):
        for extra in (["--nope"], ["--nope", "1"], ["stray"], ["--model"], ["--out"], ["--force", "yes"]):
            yield f"{make.__name__[1:]} {' '.join(extra)}", lambda f, m=make, e=extra: [*m(f), *e]
    for command in ("show", "verify", "apply", "revert", "create"):
        for count in (1, 2, 3):
            yield (
                f"patch {command} with {count} files that are not there",
                lambda f, c=command, n=count: [
                    "patch",
                    c,
                    *(str(f / f"nothing{each}") for each in range(n)),
                ],
            )
        yield f"patch {command} of rows", lambda f, c=command: ["patch", c, *[str(f / "forget.jsonl")] * 3]
        yield f"patch {command} of a folder", lambda f, c=command: ["patch", c, *[str(f / "model")] * 4]


_ROWS: dict[str, bytes] = {
    "empty": b"",
    "blank": b"\n\n",
    "not JSON": b"question: Who?\n",
    "half a line": GOOD[:-3].encode(),
    "half the second line": f"{GOOD}\n{GOOD[:-3]}".encode(),
    "a number": b"3\n",
    "a list of numbers": b"[1, 2]\n",
    "an empty list": b"[]\n",
    "null": b"null\n",
    "no answer": b'{"question": "Who?"}\n',
    "empty answer": b'{"question": "Who?", "answer": ""}\n',
    "blank answer": b'{"question": "Who?", "answer": "  "}\n',
    "empty question": b'{"question": "", "answer": "Ada"}\n',
    "answer is a number": b'{"question": "Who?", "answer": 3}\n',
    "answer is null": b'{"question": "Who?", "answer": null}\n',
    "other fields": b'{"frage": "Who?", "antwort": "Ada"}\n',
    "UTF-16": "\ufeff{}".encode("utf-16"),
    "Latin-1": '{"question": "Où?", "answer": "Ada"}\n'.encode("latin-1"),
    "zeros": bytes(64),
    "gzip": bytes([0x1F, 0x8B, 8, 0]) + bytes(20),
    "parquet": b"PAR1" + bytes(20) + b"PAR1",
    "nested too deeply": b"[" * 100_000,
    "a lone surrogate": b'{"question": "\\ud800", "answer": "Ada"}\n',
}


def rows() -> Iterator[tuple[str, Callable[[Path], Words]]]:
    """Files of rows that are none."""

    def written(files: Path, name: str) -> str:
        path = files / "rows.jsonl"
        path.write_bytes(_ROWS[name])
        return str(path)

    for name in _ROWS:
        yield f"forget rows: {name}", lambda f, n=name: _unlearn(f, forget=written(f, n))
        yield f"retain rows: {name}", lambda f, n=name: _unlearn(f, retain=written(f, n))
        yield f"world rows: {name}", lambda f, n=name: _unlearn(f, world=written(f, n))
        yield f"evaluated rows: {name}", lambda f, n=name: _evaluate(f, forget=written(f, n))
    for source in ("", "nothing.jsonl", "a:b:c:d", "no/such:set", ".", "/", "::"):
        yield f"forget source {source!r}", lambda f, s=source: _unlearn(f, forget=s)
        yield f"attributed source {source!r}", lambda f, s=source: _attribute(f, forget=s)
    yield "one row to attack", lambda f: _attack(f, forget=str(f / "forget.jsonl"))
    yield "one row to attack beside", lambda f: [*_evaluate(f), "--attack"]
    yield "one row to attack before and after", lambda f: [*_unlearn(f), "--attack"]
    yield "forget is retain", lambda f: _unlearn(f, retain=str(f / "forget.jsonl"))


def models() -> Iterator[tuple[str, Callable[[Path], Words]]]:
    """Folders of models that are none."""

    def damaged(files: Path, name: str, content: bytes | None) -> str:
        folder = files / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(files / "model", folder)
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
        return str(folder)

    broken: list[tuple[str, bytes | None]] = [
        ("config.json", None),
        ("config.json", b""),
        ("config.json", b"{}"),
        ("config.json", b'{"model_type": "nope"}'),
        ("config.json", b"[1]"),
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", bytes(100)),
        ("tokenizer.json", None),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b""),
        ("deltas.safetensors", b""),
        ("deltas.safetensors", bytes(64)),
        ("adapter_config.json", b'{"peft_type": "LORA"}'),
    ]
    for source in ("", "nothing", "./nothing", "forget.jsonl", "model/config.json", "model/model.safetensors"):
        yield f"evaluate beside {source!r}", lambda f, s=source: _evaluate(f, reference=s)
    for make in (_unlearn, _attribute, _evaluate, _attack):
        for source in ("", "nothing", "./nothing", "/nothing", "a/b/c", "forget.jsonl"):
            yield f"{make.__name__[1:]} of model {source!r}", lambda f, m=make, s=source: m(f, model=s)
        for name, content in broken:
            kind = "missing" if content is None else f"{content[:12]!r}"
            yield (
                f"{make.__name__[1:]} with {name} {kind}",
                lambda f, m=make, n=name, c=content: m(f, model=damaged(f, n, c)),
            )


def places() -> Iterator[tuple[str, Callable[[Path], Words]]]:
    """Places for results that cannot be had."""
    for make in (_unlearn, _attribute):
        yield f"{make.__name__[1:]} onto a file", lambda f, m=make: m(f, out=str(f / "forget.jsonl"))
        yield f"{make.__name__[1:]} below a file", lambda f, m=make: m(f, out=str(f / "forget.jsonl" / "out"))
        yield f"{make.__name__[1:]} onto the model", lambda f, m=make: m(f, out=str(f / "model"))
        yield f"{make.__name__[1:]} onto the model by force", lambda f, m=make: [*m(f, out=str(f / "model")), "--force"]
        yield f"{make.__name__[1:]} onto its inputs by force", lambda f, m=make: [*m(f, out=str(f)), "--force"]
    yield "attack onto a file", lambda f: _attack(f, out=str(f / "retain.jsonl"))
    yield "attack onto its rows by force", lambda f: [*_attack(f, out=str(f / "retain.jsonl")), "--force"]
    yield "attack into no folder", lambda f: _attack(f, out=str(f / "no" / "figures.json"))
    yield "evaluate onto a file", lambda f: _evaluate(f, out=str(f / "retain.jsonl"))
    yield "evaluate into no folder", lambda f: _evaluate(f, out=str(f / "no" / "figures.json"))
    yield "evaluate onto a folder", lambda f: _evaluate(f, out=str(f / "model"))


KINDS = (numbers, words, rows, models, places)
"""Every kind of bad command line."""
