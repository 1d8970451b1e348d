"""How is the house built? Lengths of functions and cells, widths of lines, what a rank imports, cycles.

    python benchmarks/house.py            the figures of this checkout
    python benchmarks/house.py OTHER      the same figures of OTHER, another checkout, beside them
"""

import ast
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGE = "nemotron_nb"
RANKS = {  # what a process of a training imports, by its names then and now
    "torch rank": ("train.torch_engine",),
    "Megatron rank": ("megatron.engine", "train.megatron_engine"),
    "artifacts": ("ops.artifacts",),
    "report": ("ops.report",),
}


def modules_of(root: Path) -> dict[str, ast.Module]:
    """Dotted name below the package -> its tree; generated indices and empty packages are left out."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        if path.name not in ("_modidx.py", "__init__.py"):
            found[".".join(path.relative_to(root / PACKAGE).with_suffix("").parts)] = ast.parse(path.read_text("utf-8"))
    return found


def _imported(name: str, node: ast.ImportFrom, modules: dict[str, ast.Module]) -> Iterator[tuple[str, str]]:
    """(module, name taken from it) for each name of an import statement that leads into the package."""
    if node.level:
        base = name.split(".")[: -node.level]
    elif node.module and node.module.split(".")[0] == PACKAGE:
        base = []
    else:
        return
    path = (node.module or "").removeprefix(PACKAGE).strip(".") if not node.level else node.module or ""
    inside = ".".join([*base, *([path] if path else [])])
    for alias in node.names:
        whole = f"{inside}.{alias.name}".strip(".")
        if whole in modules:
            yield whole, ""
        elif inside in modules:
            yield inside, alias.name


def _for_types(node: ast.AST) -> bool:
    """Is it a block that only a type checker enters?"""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(modules: dict[str, ast.Module], at_import: bool) -> dict[str, set[tuple[str, str]]]:
    """Module -> what it takes from the package: at import, or anywhere."""
    def statements(node: ast.AST) -> Iterator[ast.ImportFrom]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom):
                yield child
            elif not (at_import and (isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or _for_types(child))):
                yield from statements(child)

    return {name: {pair for node in statements(tree) for pair in _imported(name, node, modules)} for name, tree in modules.items()}


def closure(graph: dict[str, set[str]], start: str) -> set[str]:
    """All modules that are loaded with one."""
    seen, todo = set(), [start]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += graph[name]
    return seen


def cycles(graph: dict[str, set[str]]) -> int:
    """How many modules import themselves by way of others."""
    return sum(any(name in closure(graph, other) for other in graph[name]) for name in graph)


def functions_of(modules: dict[str, ast.Module]) -> list[int]:
    """Lines of every function."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [n.end_lineno - n.lineno + 1 for tree in modules.values() for n in ast.walk(tree) if isinstance(n, kinds)]


def export_cells(root: Path) -> list[tuple[int, int]]:
    """(lines, definitions) of every export cell that defines something."""
    found = []
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or not source.lstrip().startswith("#| export"):
                continue
            body = [n for n in ast.parse(source).body if not isinstance(n, ast.Import | ast.ImportFrom | ast.If)]
            if body:
                found.append((len(source.splitlines()) - 1, len(body)))
    return found


def _quantiles(values: list[int]) -> str:
    """Median, ninth decile, largest."""
    return f"{statistics.median(values):.0f} / {sorted(values)[int(len(values) * 0.9)]} / {max(values)}"


def _loaded(root: Path, names: tuple[str, ...]) -> str:
    """How many modules of the package one of them loads, and how many of those are of `data`."""
    modules = modules_of(root)
    graph = {name: {other for other, _ in pairs} for name, pairs in imports_of(modules, at_import=True).items()}
    name = next((n for n in names if n in graph), None)
    loaded = closure(graph, name) if name else set()
    return f"{len(loaded)}, of data {sum(n.startswith('data.') for n in loaded)}" if name else "-"


def figures(root: Path) -> dict[str, str]:
    """Every figure of a checkout, as it is printed."""
    modules, cells = modules_of(root), export_cells(root)
    lines = [len(x) for p in (root / PACKAGE).rglob("*.py") if p.name != "_modidx.py" for x in p.read_text("utf-8").splitlines()]
    taken = imports_of(modules, at_import=False)
    graph = {name: {other for other, _ in pairs} for name, pairs in imports_of(modules, at_import=True).items()}
    lengths = [n for n, _ in cells]
    share: Callable[[int], str] = lambda limit: f"{sum(n > limit for n in lines) / len(lines):.1%}"
    return {
        "modules": str(len(modules)),
        "functions": str(len(functions_of(modules))),
        "lines of a function (median / p90 / longest)": _quantiles(functions_of(modules)),
        "lines over 120 / over 160 characters": f"{share(120)} / {share(160)}",
        "modules in import cycles": str(cycles(graph)),
        "private names imported from another module": str(sum(name.startswith("_") for pairs in taken.values() for _, name in pairs)),
        "export cells": str(len(cells)),
        "lines of an export cell (median / p90 / longest)": _quantiles(lengths),
        "export cells of at most 10 lines / above 40": f"{sum(n <= 10 for n in lengths) / len(lengths):.0%} / {sum(n > 40 for n in lengths) / len(lengths):.0%}",
        "definitions in an export cell (mean)": f"{statistics.mean(n for _, n in cells):.2f}",
        **{f"modules loaded by {what}": _loaded(root, names) for what, names in RANKS.items()},
    }


if __name__ == "__main__":
    roots = [Path(__file__).parents[1], *map(Path, sys.argv[1:])]
    columns = [figures(root) for root in roots]
    print(f"{'':52}" + "".join(f"{root.resolve().name:>24}" for root in roots))
    for name in columns[0]:
        print(f"{name:52}" + "".join(f"{column[name]:>24}" for column in columns))
