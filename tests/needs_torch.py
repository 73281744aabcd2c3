"""Which files of a folder of tests cannot be imported without torch, and so are left out by `pytest --without-torch`.

A file needs torch if it imports one of PACKAGES outside its functions, itself or through another file of the folder.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGES = {"torch", "diffusers", "peft", "accelerate"}


def needs_torch(folder: Path) -> set[Path]:
    imports = {file: set(_imports(ast.parse(file.read_text()))) for file in folder.rglob("*.py")}
    names, count = set(PACKAGES), 0
    while count < len(names):
        count = len(names)
        names |= {file.stem for file, imported in imports.items() if imported & names}
    return {file for file in imports if file.stem in names}


def _imports(node: ast.AST) -> Iterator[str]:
    """Names of the top-level packages and modules that are imported at the import of a module."""
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield (node.module or "").partition(".")[0]
    elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in ast.iter_child_nodes(node):
            yield from _imports(child)
