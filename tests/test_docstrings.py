"""The docstrings are in TRL's format and whole, so that an API page can be built from them."""

import inspect
import re
from dataclasses import MISSING, fields, is_dataclass

import pytest
from transformers import TrainerCallback
from trl import RewardConfig

import trl_ssrm
from trl_ssrm import SSRMConfig


# What stands between an argument and what it is: "name (`type`, *optional*, defaults to `value`):".
ENTRY = re.compile(r"^( +)(\w+(?:, \w+)*) \((.+)\):$", re.MULTILINE)


def public_objects() -> list[tuple[str, object]]:
    """The public names, and the methods that their classes do not have from elsewhere."""
    found: list[tuple[str, object]] = []
    for name in trl_ssrm.__all__:
        owner = getattr(trl_ssrm, name)
        found.append((name, owner))
        if inspect.isclass(owner):
            bases = [vars(base) for base in owner.__mro__[1:]]
            found += [
                (f"{name}.{key}", getattr(owner, key))
                for key, value in vars(owner).items()
                if not key.startswith("_")
                and isinstance(value, classmethod | staticmethod | property | type(public_objects))
                and not any(key in base for base in bases)
                # The class says what its events get, as that of transformers does.
                and not (issubclass(owner, TrainerCallback) and key.startswith("on_"))
            ]
    return found


OBJECTS = dict(public_objects())


def arguments(value: object) -> dict[str, inspect.Parameter]:
    if isinstance(value, property):
        return {}
    inherited = {field.name for field in fields(RewardConfig)} if value is SSRMConfig else set()
    parameters = inspect.signature(value).parameters  # type: ignore[arg-type]
    return {name: each for name, each in parameters.items() if name not in {"self", *inherited}}


def entries(doc: str) -> dict[str, str]:
    """What stands in the brackets behind each argument, by its name."""
    return {name: rest for _, names, rest in ENTRY.findall(doc) for name in names.split(", ")}


def test_public_names_are_those_with_a_home():
    # `ssrm_reward` is an import path for TRL's script, which makes a reward function when it is looked up.
    assert sorted(trl_ssrm.__all__) == sorted(set(trl_ssrm._HOME_OF) - {"ssrm_reward"})


@pytest.mark.parametrize("name", OBJECTS)
def test_docstring_names_each_argument_with_its_type(name):
    value = OBJECTS[name]
    doc = inspect.getdoc(value) or ""
    # `dataclass` writes its signature where there is no docstring.
    assert doc and not doc.startswith(f"{name}("), "has no docstring"
    found, expected = entries(doc), arguments(value)
    assert not expected.keys() - found.keys()
    for argument, parameter in expected.items():
        assert re.match(r"(`[^`]+`|\[`[^`]+`\]|list of |tuple of |dict of )", found[argument]), argument
        # `None` for a training set is refused, here as in `RewardTrainer`.
        is_optional = parameter.default is not inspect.Parameter.empty and argument != "train_dataset"
        assert is_optional == ("*optional*" in found[argument]), argument


@pytest.mark.parametrize("name", [name for name, value in OBJECTS.items() if inspect.isroutine(value)])
def test_docstring_of_a_function_says_what_it_gives(name):
    annotation = inspect.signature(OBJECTS[name]).return_annotation
    doc = inspect.getdoc(OBJECTS[name]) or ""
    gives = "Returns:" in doc or doc.startswith(("`", "[`", "list of ", "Iterator"))
    assert gives == (annotation not in (None, "None")), doc


@pytest.mark.parametrize("name", [name for name, value in OBJECTS.items() if is_dataclass(value)])
def test_docstring_of_a_dataclass_tells_the_defaults(name):
    inherited = {field.name for field in fields(RewardConfig)} if name == "SSRMConfig" else set()
    found = entries(inspect.getdoc(OBJECTS[name]) or "")
    for field in fields(OBJECTS[name]):  # type: ignore[arg-type]
        if field.name in inherited or not field.init:
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        shown = f'"{default}"' if isinstance(default, str) else str(default).replace("'", '"')
        # `None` and what fills half a page are told in words.
        if default not in (None, MISSING) and len(shown) < 60:
            assert f"defaults to `{shown}`" in found[field.name], field.name
    # No argument that is none.
    assert found.keys() <= {field.name for field in fields(OBJECTS[name])}  # type: ignore[arg-type]
