"""Imports of the package run one way."""

import ast
import shutil
from pathlib import Path

import trl_ssrm


PACKAGE = Path(trl_ssrm.__file__).parent

# A room may import itself and those before it.
ROOMS = (
    "config",
    "io",
    "data",
    "models",
    "scoring",
    "rounds",
    "reporting",
    "trainer",
    "alignment",
    "evaluation",
    "cli",
)


def imports_of(package: Path) -> dict[str, list[str]]:
    """Modules of a package that each of its modules imports anywhere, under `TYPE_CHECKING` too; names start in the package."""
    imports = {}
    for file in sorted(package.rglob("*.py")):
        own = file.relative_to(package).with_suffix("").parts
        modules = []
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                named = [node.module] if node.module else [alias.name for alias in node.names]
                modules += [".".join([*own[: len(own) - node.level], name]) for name in named]
        imports[".".join(own)] = modules
    return imports


def arrows_that_point_up(imports: dict[str, list[str]]) -> list[str]:
    """Imports of a later room, and of the trainer by any room but `cli`."""
    wrong = []
    for own, modules in imports.items():
        for module in modules:
            room, from_room = module.split(".")[0], own.split(".")[0]
            if room in ROOMS and from_room in ROOMS:
                points_up = ROOMS.index(room) > ROOMS.index(from_room)
                if points_up or (room == "trainer" and from_room != "cli"):
                    wrong.append(f"{own} -> {module}")
    return wrong


def circles(imports: dict[str, list[str]]) -> list[str]:
    """Modules that import one another in a circle, and modules that import these."""
    left = {name: modules for name, modules in imports.items() if name != "__init__"}
    # Take away what imports nothing that is left, until nothing is left to take.
    while free := [name for name, modules in left.items() if not set(modules) & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_imports_run_one_way():
    imports = imports_of(PACKAGE)
    assert {name.split(".")[0] for name in imports} <= {*ROOMS, "__init__"}
    assert not arrows_that_point_up(imports)
    assert not circles(imports)


def test_an_import_that_is_turned_round_is_found(tmp_path):
    package = tmp_path / "package"
    shutil.copytree(PACKAGE, package)
    with (package / "data" / "pool.py").open("a", encoding="utf-8") as file:
        file.write(
            "\nif TYPE_CHECKING:\n    from ..trainer import SSRMTrainer\n    from .build_pool import build_pool\n"
        )
    assert arrows_that_point_up(imports_of(package)) == ["data.pool -> trainer"]
    assert {"data.pool", "data.build_pool"} <= set(circles(imports_of(package)))
