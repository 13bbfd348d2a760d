"""Parser of the commands that train: TRL's parser, which reads dataclasses and a YAML file."""

import argparse
from typing import Any

import torch
import yaml
from trl import TrlParser

from .errors import OneLineParser


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of each argument, and keeps the line breaks of the examples."""


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
