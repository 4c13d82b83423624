"""The shape of the code: rooms import downward, nothing runs at import, files and functions stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "regpt2"
MODULES = sorted(SRC.rglob("*.py"))
# What each room may import from, besides itself. Seven floors: the ground is base, the roof cli.
ROOMS = {
    "base": set(),
    "data": {"base"},
    "model": {"base"},
    "references": {"base"},
    "pages": {"base", "references"},
    "sampling": {"base", "data", "model"},
    "training": {"base", "model"},
    "exploring": {"base", "data", "model", "pages"},
    "evals": {"base", "data", "model", "references", "sampling", "training"},
    "config": {"base", "data", "model", "references", "training"},
    "machine": {"base", "config", "data", "model", "pages", "training"},
    "run": {"base", "config", "data", "evals", "model", "pages", "references", "sampling", "training"},
    "serving": {"base", "data", "exploring", "model", "pages", "references", "sampling"},
}
ROOMS["commands"] = set(ROOMS)
ROOMS["api"] = set(ROOMS)  # what `import regpt2` gives
ROOMS["cli"] = {"base"}  # a command is imported by its name
GUARDS = ("__name__", "platform", "TYPE_CHECKING")
REGISTRATIONS = ("register_autograd",)  # gives an operator its gradient; torch has no decorator for it
SHELVES = ("commands", "data/datasets", "data/token_formats", "model/weights", "training/optim", "evals")


def imported(file: Path) -> set[str]:
    """Modules of ours that a file imports, as paths below regpt2: "base.errors"."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("regpt2"):
            base = node.module.removeprefix("regpt2").lstrip(".")
            for name in node.names:
                whole = f"{base}.{name.name}".lstrip(".")
                path = SRC / whole.replace(".", "/")
                found.add(whole if path.is_dir() or path.with_suffix(".py").exists() else base)
        elif isinstance(node, ast.Import):
            found |= {n.name.removeprefix("regpt2.") for n in node.names if n.name.startswith("regpt2.")}
    return found - {""}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(SRC).with_suffix("").parts)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_downward(room: str) -> None:
    for file in (SRC / room).rglob("*.py") if (SRC / room).is_dir() else [SRC / f"{room}.py"]:
        above = {module.split(".")[0] for module in imported(file)} - ROOMS[room] - {room}
        assert not above, f"{name_of(file)} imports from {above}; {room} may import from {sorted(ROOMS[room])}"


def test_an_upward_import_is_seen(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("from regpt2.training.step import train_step\nfrom regpt2 import config\n")
    assert {module.split(".")[0] for module in imported(planted)} - {"base"} == {"training", "config"}


def test_the_rooms_are_all_that_there_is_and_few() -> None:
    found = {path.stem for path in SRC.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__", "__main__"} == set(ROOMS)
    assert len(ROOMS) <= 16


def test_there_are_at_most_seven_floors() -> None:
    def floor(room: str) -> int:
        return 1 + max((floor(below) for below in ROOMS[room]), default=0)

    assert max(map(floor, ROOMS)) <= 7


@pytest.mark.parametrize("folder", sorted({file.parent for file in MODULES}), ids=lambda folder: folder.name)
def test_a_folder_that_is_no_shelf_has_at_most_ten_files(folder: Path) -> None:
    files = [file.name for file in folder.glob("*.py") if file.name != "__init__.py"]
    assert folder.relative_to(SRC).as_posix() in SHELVES or len(files) <= 10, files


def test_no_module_has_a_name_of_the_standard_library() -> None:
    """`python src/regpt2/run/loop.py` puts its folder first on the path: an `inspect.py` there would be torch's."""
    hiding = [name_of(file) for file in MODULES if file.stem in sys.stdlib_module_names]
    assert not hiding, f"{hiding} hide modules of the standard library"


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
    """At the top level stand imports, definitions, constants; a call only to make a constant, or to register."""
    harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    for node in ast.parse(file.read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_guard = isinstance(node, ast.If) and any(word in ast.dump(node.test) for word in GUARDS)
        is_registration = isinstance(node, ast.Expr) and any(word in ast.dump(node) for word in REGISTRATIONS)
        allowed = is_docstring or is_guard or is_registration
        assert isinstance(node, harmless) or allowed, f"{name_of(file)}:{node.lineno} does something"


def test_importing_the_package_loads_no_torch_and_opens_nothing() -> None:
    code = "import sys, regpt2, regpt2.cli, regpt2.commands.prepare; print(*{'torch', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


PICKLES = {"pickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "copyreg", "UnpicklingError"}
ARCHIVES = {"extract", "extractall", "unpack_archive"}
CODE = {"eval", "exec", "compile", "__import__", "execfile", "os.system", "os.popen", "runpy.run_path"}
MAY = {
    "torch.load": "model.files.safe_pickle",
    "importlib.import_module": "base.shelves cli",
    "importlib.util.spec_from_file_location": "base.shelves",
    "spec.loader.exec_module": "base.shelves",
}


def dangers(text: str, module: str) -> list[str]:
    """Lines of a module that unpickle, run code out of data, open a shell, or unpack an archive."""
    return [
        f"{module}:{getattr(node, 'lineno', 0)} {fault}"
        for node in ast.walk(ast.parse(text))
        for fault in (danger_of_import(node), danger_of_call(node, module))
        if fault
    ]


def danger_of_import(node: ast.AST) -> str:
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return ""
    names = {n.name for n in node.names} | {getattr(node, "module", "") or ""}
    if "torch" in names and any(n.name == "load" for n in node.names):
        return "hides torch.load"
    return "unpickles" if {name.split(".")[0] for name in names} & PICKLES else ""


def danger_of_call(node: ast.AST, module: str) -> str:
    if not isinstance(node, ast.Call):
        return ""
    called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
    if called in CODE:
        return "runs code"
    constant = node.args and isinstance(node.args[0], ast.Constant)  # a name that no file can change
    if called in MAY and module not in MAY[called].split() and not (constant and "import" in called):
        return f"{called} has no place here"
    if called == "torch.load" and given.get("weights_only") != "True":
        return "unpickles more than tensors"
    if called in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
        return "may unpickle"
    if called.startswith("yaml.load") or given.get("shell", "False") != "False":
        return "runs what a file says"
    return "unpacks an archive" if called.rsplit(".", 1)[-1] in ARCHIVES else ""


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_no_pickle_and_no_code_from_files_in_the_source(file: Path) -> None:
    assert not dangers(file.read_text(), name_of(file))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import load",
        "import torch.utils.data, marshal",
        "from torch import load",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "eval(text)",
        "__import__(name)",
        "importlib.import_module(name)",
        "importlib.util.spec_from_file_location(name, path)",
        "spec.loader.exec_module(module)",
        "tarfile.open(path).extractall(folder)",
        "shutil.unpack_archive(path)",
    ],
)
def test_a_planted_danger_is_seen(line: str) -> None:
    assert dangers(line, "planted")


def test_only_tensors_are_unpickled() -> None:
    assert dangers("torch.load(path, weights_only=False)", "model.files.safe_pickle")
    assert not dangers("torch.load(path, weights_only=True)", "model.files.safe_pickle")
