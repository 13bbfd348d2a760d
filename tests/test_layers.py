"""Imports of the package run one way."""

import ast
from pathlib import Path

import trl_ssrm


PACKAGE = Path(trl_ssrm.__file__).parent

# A room may import itself and those before it.
ROOMS = ("config", "io", "data", "models", "scoring", "rounds", "reporting", "trainer", "alignment", "evaluation", "cli")


def imported_modules(file: Path) -> list[str]:
    """Modules of the package that a file imports anywhere in it, under `TYPE_CHECKING` too, from the package on."""
    own = file.relative_to(PACKAGE).with_suffix("").parts
    modules = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = own[: len(own) - node.level]
            named = [node.module] if node.module else [alias.name for alias in node.names]
            modules += [".".join([*start, name]) for name in named]
    return modules


def test_imports_run_one_way():
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        own = file.relative_to(PACKAGE).with_suffix("").parts
        for module in imported_modules(file):
            room = module.split(".")[0]
            if room not in ROOMS or own == ("__init__",):
                continue
            points_up = ROOMS.index(room) > ROOMS.index(own[0])
            is_trainer = room == "trainer" and own[0] != "cli"
            if points_up or is_trainer:
                wrong.append(f"{'.'.join(own)} -> {module}")
    assert not wrong


def test_no_circles_within_a_room():
    imports_of = {}
    for file in PACKAGE.rglob("*.py"):
        own = file.relative_to(PACKAGE).with_suffix("").parts
        imports_of[".".join(own)] = imported_modules(file)
    del imports_of["__init__"]
    # Take away what imports nothing that is left, until nothing is left to take.
    while free := [name for name, modules in imports_of.items() if not set(modules) & imports_of.keys()]:
        for name in free:
            del imports_of[name]
    assert not imports_of
