"""Modules keep no state of their own, print nothing, draw from generators and load no pickle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.rules.sources import OURS, SOURCES, calls, imports, named


def is_constant(value: ast.expr | None) -> bool:
    """Whether a module may hold the value: nothing in it can be changed later."""
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return False
    if isinstance(value, ast.Call):
        called = ast.unparse(value.func).split(".")[-1]
        return called not in {"list", "dict", "set", "defaultdict", "Counter", "OrderedDict", "deque", "split"}
    return True


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_modules_hold_no_mutable_state_and_do_nothing_when_imported(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            assert target == "__all__" or is_constant(node.value), f"{target} can be changed"
        elif isinstance(node, ast.If):
            assert ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
        elif isinstance(node, ast.Try):
            assert all(isinstance(inner, ast.Import | ast.ImportFrom) for inner in node.body), "only imports may fail"
        elif isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"line {node.lineno} runs at import: {ast.unparse(node)}"
        else:
            assert isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef), node.lineno
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree))


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_the_package_does_not_print(path: Path) -> None:
    assert not [call.lineno for call in calls(path) if isinstance(call.func, ast.Name) and call.func.id == "print"]


DRAWS = {
    *("rand", "randn", "randint", "randperm", "multinomial", "normal"),
    *("bernoulli", "bernoulli_", "normal_", "uniform_", "random_", "exponential_"),
}


GLOBAL_RANDOMNESS = ("torch.manual_seed", "torch.seed", "torch.random.", "torch.cuda.manual_seed", "np.random.")


def global_draws(path: Path) -> list[str]:
    """The calls of a file that draw from, or set, a source of randomness that others share."""
    tree = ast.parse(path.read_text())
    # Where a library takes no generator, the shared source may be set as long as it is restored.
    restored = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and "torch.random.fork_rng" in ast.unparse(node.items[0])
        for inner in ast.walk(node)
    }
    found = []
    for call in calls(path, tree):
        if id(call) in restored:
            continue
        name = ast.unparse(call.func)
        draws = isinstance(call.func, ast.Attribute) and call.func.attr in DRAWS
        has_generator = any(keyword.arg == "generator" for keyword in call.keywords)
        shared = (
            name.startswith(GLOBAL_RANDOMNESS)
            or (name.endswith("_like") and "rand" in name)
            or (name.startswith("random.") and not name.startswith("random.Random"))
        )
        if shared or (draws and not has_generator and name != "NeuronSelection.random"):
            found.append(f"{path.name}:{call.lineno} {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_randomness_comes_from_a_generator(path: Path) -> None:
    assert global_draws(path) == []


def test_a_draw_without_a_generator_is_seen(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("torch.rand(2)\ntorch.manual_seed(0)\nrandom.shuffle(x)\ntorch.randn_like(x)\nrandom.Random(0)\n")
    assert [line.split(":")[1] for line in global_draws(wrong)] == [
        "1 torch.rand",
        "2 torch.manual_seed",
        "3 random.shuffle",
        "4 torch.randn_like",
    ]


@pytest.mark.parametrize("path", [path for path in OURS if "tests" not in path.parts], ids=named)
def test_nothing_is_loaded_by_pickle(path: Path) -> None:
    assert not {"pickle", "cloudpickle", "dill", "joblib"} & {name.split(".")[0] for name in imports(path)}
    for call in calls(path):
        if ast.unparse(call.func) == "torch.load":
            assert any(
                keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in call.keywords
            )
