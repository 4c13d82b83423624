"""Code quoted by its name. In: "model/gpt.py: GPT.forward"; out: its lines as they are in the source today."""

import ast
import textwrap
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "regpt2"


def quote(place: str) -> str:
    """The lines of one or several names of a file, without their indentation.

    `place` is a path below src/regpt2, a colon, and names with commas between: functions, classes, methods as
    Class.method, or a constant. Raises ValueError for a name that the file has not.
    """
    path, _, names = place.partition(":")
    source = (PACKAGE / path.strip()).read_text()
    lines = source.split("\n")
    tree = ast.parse(source)
    found = []
    for name in names.split(","):
        node = _find(tree, name.strip().split("."))
        if node is None:
            raise ValueError(f"{path} has no {name.strip()}")
        start = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
        found.append(textwrap.dedent("\n".join(lines[start - 1 : node.end_lineno])))
    return "\n\n".join(found)


def _find(tree: ast.AST, names: list[str]) -> ast.stmt | None:
    """The definition of names[0] in `tree`, of names[1] within it, and so on."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.stmt) and names[0] in _defines(node):
            return node if len(names) == 1 else _find(node, names[1:])
    return None


def _defines(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}
