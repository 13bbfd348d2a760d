"""The parser of the commands that train: TRL's, whose arguments come from dataclasses and a YAML file."""

import argparse
from typing import Any

import yaml
from trl import TrlParser

from .errors import OneLineParser


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each argument, and examples as they were written."""


class TrainingParser(OneLineParser, TrlParser):
    """
    TRL's parser, with `--config` in its help and one line for an error.

    Args:
        dataclass_types (`tuple[type, ...]`):
            Dataclasses to be parsed.
        kwargs:
            As for [`~argparse.ArgumentParser`].
    """

    def __init__(self, dataclass_types: tuple[type, ...], **kwargs: Any):
        # The names of all arguments, with which a usage begins, fill a screen.
        usage = "%(prog)s [--config FILE] [ARGUMENT VALUE ...]"
        super().__init__(dataclass_types, usage=usage, formatter_class=_Formatter, allow_abbrev=False, **kwargs)  # type: ignore[arg-type]
        self.add_argument("--config", help="YAML file with arguments; those of the command line win")

    def parse(self, argv: list[str]) -> tuple[list[Any], list[str]]:
        """
        Parse arguments, and those of the file that `--config` names.

        Args:
            argv (`list[str]`):
                Arguments.

        Returns:
            `tuple[list, list[str]]`: an instance of each dataclass, and the arguments that are none of theirs.

        Raises:
            ValueError: If an argument or the file can't be used.
        """
        # `TrlParser` knows `--config FILE` only, once.
        argv = [part for each in argv for part in (each.split("=", 1) if each.startswith("--config=") else [each])]
        if argv.count("--config") > 1 or argv[-1:] == ["--config"]:
            self.error("--config takes one file")
        try:
            *parsed, _, from_file, from_line = self.parse_args_and_config(
                argv, return_remaining_strings=True, separate_remaining_strings=True
            )
        except yaml.YAMLError as error:
            raise ValueError(f"{argv[argv.index('--config') + 1]} is no YAML: {error}") from error
        return parsed, from_file + from_line
