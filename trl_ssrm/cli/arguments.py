"""Parser of the commands that train: TRL's parser, which reads dataclasses and a YAML file."""

import argparse
import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
import yaml
from trl import TrlParser

from ..config import SSRMConfig
from .errors import OneLineParser


# Arguments of TRL and transformers that most runs set.
_COMMON = (
    *("output_dir", "num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *(
        "max_length",
        "eos_token",
        "bf16",
        "gradient_checkpointing",
        "eval_strategy",
        "save_strategy",
        "report_to",
        "seed",
    ),
)
_OF_THE_MODEL = ("model_name_or_path", "dtype", "attn_implementation", "use_peft", "lora_r", "load_in_4bit")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of each argument, and keeps the line breaks of the examples."""


class _HelpAll(argparse.Action):
    """Prints the help with all arguments."""

    def __call__(self, parser: Any, *args: Any) -> None:
        parser.shows_all = True
        parser.print_help()
        parser.exit()


class TrainingParser(OneLineParser, TrlParser):
    """
    TRL's parser, with `--config` in the help and errors of one line.

    Args:
        dataclass_types (`tuple[type, ...]`):
            Dataclasses whose fields are the arguments.
        kwargs (`dict[str, Any]`):
            Passed on to [`~argparse.ArgumentParser`].
    """

    def __init__(self, dataclass_types: tuple[type, ...], **kwargs: Any):
        # The usage of argparse would name all arguments, which fills a screen.
        usage = "%(prog)s [--config FILE] [ARGUMENT VALUE ...]"
        super().__init__(dataclass_types, usage=usage, formatter_class=_Formatter, allow_abbrev=False, **kwargs)  # type: ignore[arg-type]
        self.add_argument("--config", help="YAML file with arguments; the command line overrides it")
        self.add_argument("--help_all", action=_HelpAll, nargs=0, default=argparse.SUPPRESS, help="show all arguments")
        self.shows_all = False
        of_the_command = [each.name for kind in dataclass_types[:1] for each in fields(kind)]
        self.sections = {
            "options": ("help", "help_all", "config"),
            "data and command": of_the_command,
            "model": _OF_THE_MODEL,
            "rounds and pseudo-labels": list(SSRMConfig.__annotations__),
            "training": _COMMON,
        }

    def format_help(self) -> str:
        """`str`: the help, in sections, with the arguments that most runs need; all of them with `--help_all`."""
        if self.shows_all:
            return super().format_help()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        actions = {action.dest: action for action in self._actions}
        shown = 0
        for title, names in self.sections.items():
            formatter.start_section(title)
            formatter.add_arguments([actions[name] for name in names if name in actions])
            formatter.end_section()
            shown += sum(name in actions for name in names)
        formatter.add_text(f"{len(actions) - shown} more arguments of TRL and transformers: --help_all")
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def similar(self, unknown: Iterable[str]) -> str:
        """`str`: a question that names the nearest argument to the first unknown one that has any, or nothing."""
        for argument in unknown:
            name = argument.split("=", 1)[0]
            nearest = difflib.get_close_matches(
                name.replace("-", "_"), [f"__{each.dest}" for each in self._actions], 1, 0.75
            )
            if name.startswith("--") and nearest:
                return f" (did you mean `--{nearest[0][2:]}`?)"
        return ""

    def parse(self, argv: list[str]) -> tuple[list[Any], list[str]]:
        """
        Parse arguments, including those in the file that `--config` names.

        Args:
            argv (`list[str]`):
                Arguments of the command line.

        Returns:
            `tuple[list, list[str]]`: an instance of each dataclass, and the unknown arguments: first those of the file,
            then those of the command line.

        Raises:
            ValueError: If an argument is invalid, or the file is not valid YAML.
        """
        # `TrlParser` reads neither `--config=FILE` nor a second `--config`.
        if not torch.accelerator.is_available():
            # TRL turns both on, which a CPU refuses or is slowed down by. The file and the line override them.
            self.set_defaults(bf16=False, gradient_checkpointing=False)
        argv = [part for each in argv for part in (each.split("=", 1) if each.startswith("--config=") else [each])]
        if argv.count("--config") > 1 or argv[-1:] == ["--config"]:
            self.error("pass `--config` once, followed by one file")
        try:
            *parsed, _, from_file, from_line = self.parse_args_and_config(
                argv, return_remaining_strings=True, separate_remaining_strings=True
            )
        except yaml.YAMLError as error:
            raise ValueError(f"{argv[argv.index('--config') + 1]} is not valid YAML; correct it: {error}") from error
        except FileNotFoundError as error:
            raise ValueError(
                f"There is no file {error.filename}; `--config` takes a YAML file with arguments."
            ) from error
        return parsed, from_file + from_line
