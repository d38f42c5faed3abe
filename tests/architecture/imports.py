"""Which files of this project a module needs, read from its import statements."""

import ast
from functools import cache
from pathlib import Path


def imported_files(entry: Path) -> set[Path]:
    """`entry` and every project file it imports, directly or not; imports for type checkers do not count."""
    found: set[Path] = set()
    waiting = [entry]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _direct_imports(path)
    return found


@cache
def _direct_imports(path: Path) -> list[Path]:
    files: set[Path] = set()
    for node in _runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("stages", "flows"):
            files |= _files_of(node.module)
            for alias in node.names:
                files |= _files_of(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in ("stages", "flows"):
                    files |= _files_of(alias.name)
    return sorted(files)


def _runtime_nodes(tree: ast.AST) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        nodes.append(node)
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        waiting += node.orelse if is_typing else list(ast.iter_child_nodes(node))
    return nodes


def _files_of(module: str) -> set[Path]:
    """The module's file and its packages' `__init__` files, which run first."""
    parts = module.split(".")
    files = {Path(*parts[: depth + 1], "__init__.py") for depth in range(len(parts))}
    files.add(Path(*parts).with_suffix(".py"))
    return {file for file in files if file.is_file()}
