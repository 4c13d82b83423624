"""The shape of the code: rooms import downward, nothing runs at import, files and functions stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "regpt2"
MODULES = sorted(SRC.rglob("*.py"))
ROOMS = {
    "base": {"base"},
    "data": {"base", "data"},
    "model": {"base", "model"},
    "training": {"base", "model", "training"},
    "evals": {"base", "data", "model", "evals"},
    "recipes": set(),
    "pages": {"base", "pages"},
}
LOWER = set(ROOMS)
GUARDS = ("__name__", "platform", "TYPE_CHECKING")
SHELVES = ("data/datasets", "model/weights", "training/optim", "evals")


def imported(file: Path) -> set[str]:
    """Modules of ours that a file imports, as paths below regpt2: "base.errors"."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("regpt2"):
            base = node.module.removeprefix("regpt2").lstrip(".")
            for name in node.names:
                whole = f"{base}.{name.name}".lstrip(".")
                found.add(whole if (SRC / whole.replace(".", "/")).with_suffix(".py").exists() else base)
        elif isinstance(node, ast.Import):
            found |= {n.name.removeprefix("regpt2.") for n in node.names if n.name.startswith("regpt2.")}
    return found - {""}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(SRC).with_suffix("").parts)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_downward(room: str) -> None:
    for file in (SRC / room).rglob("*.py"):
        above = {module.split(".")[0] for module in imported(file)} - ROOMS[room]
        assert not above, f"{name_of(file)} takes from {above}; {room}/ may take from {sorted(ROOMS[room])}"


def test_an_upward_import_is_seen(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("from regpt2.training.step import train_step\nfrom regpt2 import config\n")
    assert {module.split(".")[0] for module in imported(planted)} - ROOMS["base"] == {"training", "config"}


def test_config_imports_only_rooms() -> None:
    assert {module.split(".")[0] for module in imported(SRC / "config.py")} <= LOWER


def test_no_circles() -> None:
    graph = {name_of(file).removesuffix(".__init__"): imported(file) for file in MODULES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join((*way[way.index(module) :], module))}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("shelf", SHELVES)
def test_entries_of_a_shelf_do_not_import_each_other(shelf: str) -> None:
    entries = {name_of(file) for file in (SRC / shelf).glob("*.py") if file.name != "__init__.py"}
    for file in (SRC / shelf).glob("*.py"):
        assert not imported(file) & (entries - {name_of(file)}), f"{name_of(file)} imports a neighbor"


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_files_and_functions_are_small_and_flat(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= 400, f"{name_of(file)} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 60, f"{name_of(file)}: {node.name} has {lines} lines"
            assert depth(node) <= 4, f"{name_of(file)}: {node.name} nests {depth(node)} deep"


def depth(node: ast.AST) -> int:
    """How deep loops, conditions and handlers nest; `elif` and `with` do not count as deeper."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            continue
        is_elif = isinstance(node, ast.If) and node.orelse == [child] and isinstance(child, ast.If)
        counts = isinstance(child, ast.For | ast.While | ast.If | ast.Try) and not is_elif
        deepest = max(deepest, depth(child) + counts)
    return deepest


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_every_module_says_what_it_is(file: Path) -> None:
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    assert docstring, f"{name_of(file)} has no docstring"


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_modules_do_nothing_when_imported(file: Path) -> None:
    """At the top level stand imports, definitions, constants; a call only to make a constant."""
    harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in ast.parse(file.read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_guard = isinstance(node, ast.If) and any(word in ast.dump(node.test) for word in GUARDS)
        assert isinstance(node, harmless) or is_docstring or is_guard, f"{name_of(file)}:{node.lineno} does something"


def test_importing_the_package_loads_no_torch_and_opens_nothing() -> None:
    code = "import sys, regpt2, regpt2.cli, regpt2.prepare; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_no_pickle_and_no_code_from_files_in_the_source() -> None:
    for file in MODULES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {n.name for n in node.names} | {getattr(node, "module", "")}
                if names == {"pickle", "UnpicklingError"}:  # an exception to catch, nothing that loads
                    continue
                assert not names & {"pickle", "dill", "cloudpickle", "shelve", "marshal"}, (
                    f"{name_of(file)}:{node.lineno}"
                )
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec", "pickle.load"):
                raise AssertionError(f"{name_of(file)}:{node.lineno} runs code from data")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
