"""Data flows one way: a module imports lower floors only, keeps no state of its own, and stays small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "torch_simu"
SOURCES = sorted(PACKAGE.rglob("*.py"))
OURS = sorted(
    path for folder in ("torch_simu", "tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)

FLOORS = {
    "_checks": 1,
    "_hashes": 1,
    "columns": 1,
    "_files": 2,
    "bitsandbytes": 2,
    "curvature": 2,
    "layers": 2,
    "update": 2,
    "hooks": 3,
    "neurons": 3,
    "attribution": 4,
    "deltas": 4,
    "optimizer": 4,
    "patch": 5,
    "unlearning": 6,
    "cli": 7,
    "__init__": 7,
    "__main__": 8,
}
"""A file or folder of the package -> the floor it is on."""

TENSORS_ONLY = {"torch", "einops"}
OPTIONAL = {
    *("accelerate", "bitsandbytes", "datasets", "matplotlib", "rich"),
    *("rouge_score", "scipy", "tokenizers", "transformers", "typer"),
}


def room(path: Path) -> str:
    """The file or folder directly in the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, top_level: bool = False) -> Iterator[str]:
    """Every module that a file imports, or only those it imports when it is imported itself."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in tree.body if top_level else ast.walk(tree):
        if id(node) in typing_only and top_level:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            yield str(node.module)
            # `from package import name` may name a module.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def calls(path: Path, tree: ast.AST | None = None) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree or ast.parse(path.read_text())) if isinstance(node, ast.Call))


def own_rooms(path: Path) -> set[str]:
    """The other rooms of the package that a file imports."""
    found = {name.split(".")[1] for name in imports(path) if name.startswith("torch_simu.")}
    root_names = {name for name in found if name not in FLOORS}
    assert not root_names or room(path) in ("__init__", "__main__"), f"{path.name} imports {root_names} from the top"
    return found - root_names - {room(path)}


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_every_file_has_a_floor_and_imports_lower_floors_only(path: Path) -> None:
    assert room(path) in FLOORS, f"{room(path)} has no floor yet: add it to FLOORS"
    higher = {name for name in own_rooms(path) if FLOORS[name] >= FLOORS[room(path)]}
    assert not higher


def test_an_import_of_a_higher_floor_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    wrong = tmp_path / "layers.py"
    wrong.write_text("def f():\n    from torch_simu.neurons import NeuronSelection\n")
    with pytest.raises(AssertionError):
        test_every_file_has_a_floor_and_imports_lower_floors_only(wrong)


@pytest.mark.parametrize("name", ["columns", "update", "curvature"])
def test_the_maths_sees_tensors_only(name: str) -> None:
    allowed = {*TENSORS_ONLY, *sys.stdlib_module_names}
    found = set(imports(PACKAGE / f"{name}.py"))
    assert all(module.split(".")[0] in allowed or module.startswith("torch_simu._checks") for module in found)


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_optional_packages_are_imported_where_they_are_used_only(path: Path) -> None:
    allowed = {"transformers"} if room(path) in ("unlearning", "cli") else set()
    if room(path) == "cli":
        allowed |= {"rich", "typer"}
    assert {name.split(".")[0] for name in imports(path, top_level=True)} & OPTIONAL <= allowed
    assert room(path) == "bitsandbytes" or "bitsandbytes" not in {name.split(".")[0] for name in imports(path)}


def test_importing_the_package_imports_no_optional_package() -> None:
    program = f"import sys, torch_simu; print(*sorted({OPTIONAL!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""


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


@pytest.mark.parametrize("path", OURS, ids=named)
def test_files_are_small_and_say_what_they_are(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in ("utils", "helpers", "misc", "common")
    source = ast.parse(path.read_text())
    assert ast.get_docstring(source) or not source.body


@pytest.mark.parametrize("path", [path for path in OURS if "tests" not in path.parts], ids=named)
def test_nothing_is_loaded_by_pickle(path: Path) -> None:
    assert not {"pickle", "cloudpickle", "dill", "joblib"} & {name.split(".")[0] for name in imports(path)}
    for call in calls(path):
        if ast.unparse(call.func) == "torch.load":
            assert any(
                keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in call.keywords
            )


def module_graph() -> dict[str, set[str]]:
    """Which modules of the package each of them imports when it is imported."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    return {name: set(imports(path, top_level=True)) & names.keys() - {name} for name, path in names.items()}


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = module_graph()
    # A folder's own __init__ only gathers names, so its files may live beside it without importing it.
    while leaves := [name for name, needed in graph.items() if not needed & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph
