"""Recipes as scripts, for the tests."""

import contextlib
import io
import runpy
from pathlib import Path

import pytest


RECIPES = Path(__file__).parent.parent / "recipes"
# TRL turns the first two on, and both are slow on a CPU.
ON_CPU = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "disable_tqdm": True}


def arguments(name: str, settings: dict) -> list[str]:
    """Path and arguments of a recipe: its own configuration, and settings in place of some of it."""
    path = RECIPES / f"{name}.py"
    command = [str(path)]
    for setting, value in {"config": path.with_suffix(".yaml"), **settings}.items():
        command += [f"--{setting}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return command


def run_as_script(*command: str) -> str:
    """Run a Python script in this process and return its output."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr("sys.argv", list(command))
        # As Python does it for a script.
        patch.syspath_prepend(str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")
    return output.getvalue()


def run_recipe(name: str, **settings) -> str:
    """Run a recipe with some settings in place of its own and return its output."""
    return run_as_script(*arguments(name, {**ON_CPU, **settings}))
