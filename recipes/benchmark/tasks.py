"""
The tasks of quality.py: preference pairs, grouped so that no text of a test pair is seen in training.

Two tasks come with Python: `documentation` asks which of two paragraphs describes a function of the standard library, and
`parameters` which of two texts explains a parameter of a function of pandas or NumPy. The other tasks are Parquet files with
`prompt`, `chosen` and `rejected`, as messages.
"""

import inspect
import random
import re

import numpy
import pandas
from common import split_by_prompt
from datasets import Dataset

from trl_ssrm.cli.quickstart import documentation_pairs


Row = dict[str, str]

OWNERS = {
    **{"pandas": pandas, "DataFrame": pandas.DataFrame, "Series": pandas.Series, "Index": pandas.Index},
    **{"str": pandas.Series.str, "dt": pandas.Series.dt, "MultiIndex": pandas.MultiIndex},
    **{"Timestamp": pandas.Timestamp, "types": pandas.api.types, "numpy": numpy, "linalg": numpy.linalg},
    **{"fft": numpy.fft, "ma": numpy.ma, "char": numpy.char, "Generator": numpy.random.Generator},
}


def parameters_of(documentation: str) -> Row:
    """Texts of the parameters in a docstring of NumPy's format, by name."""
    section = re.search(r"Parameters\n-+\n(.*?)(?:\n\n?[A-Z][A-Za-z ]+\n-+\n|\Z)", documentation, re.S)
    texts: dict[str, list[str]] = {}
    name = None
    for line in section[1].split("\n") if section else []:
        if line and not line.startswith(" "):
            header = re.match(r"(\w+) ?:", line)
            name = header[1] if header else None
            if name is not None:
                texts[name] = []
        elif name is not None:
            texts[name].append(line.strip())
    return {name: " ".join(" ".join(lines).split()) for name, lines in texts.items()}


def parameter_pairs() -> dict[str, list[Row]]:
    """Pairs by function; the rejected text explains another parameter of the function. Each text is chosen once."""
    draw, rows_of, seen = random.Random(0), {}, set()
    for owner, names in OWNERS.items():
        for name, value in sorted(vars(names).items()):
            if name.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
                continue
            texts = parameters_of(inspect.getdoc(value) or "")
            for parameter, text in texts.items():
                others = sorted(set(texts.values()) - {text, ""})
                if len(text) >= 30 and text not in seen and others:
                    seen.add(text)
                    prompt = f"What is the parameter {parameter} of {owner}.{name}?"
                    row = {"prompt": prompt, "chosen": text, "rejected": draw.choice(others)}
                    rows_of.setdefault(f"{owner}.{name}", []).append(row)
    return rows_of


def pairs_of_file(path: str) -> dict[str, list[Row]]:
    """Pairs of a Parquet file as text, by prompt."""
    rows_of: dict[str, list[Row]] = {}
    for row in Dataset.from_parquet(path):
        texts = {name: "\n".join(message["content"] for message in row[name]) for name in row}
        rows_of.setdefault(texts["prompt"], []).append(texts)
    return rows_of


def load_task(name: str) -> dict[str, list[Row]]:
    """Pairs of a task by group: the name of a task above, or the path of a file."""
    if name == "documentation":
        return {row["prompt"]: [row] for row in documentation_pairs(0)}
    return parameter_pairs() if name == "parameters" else pairs_of_file(name)


def load_parts(name: str, tokenizer, max_pairs: int, pairs_per_prompt: int, lengths: tuple[int, int]):
    """
    Pairs of a task by part (train, dev, test) and group, as text with at most so many tokens of a prompt (from its end) and
    of an answer (from its start).
    """

    # A decoder has no separator: a line ends between prompt and answer.
    separator = f" {tokenizer.sep_token} " if tokenizer.sep_token is not None else "\n"

    def cut(text: str, size: slice) -> str:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokenizer.decode(ids[size]) if len(ids[size]) < len(ids) else text

    def cut_row(row: Row) -> Row:
        prompt = cut(row["prompt"], slice(-lengths[0], None)) + separator
        return {"prompt": prompt, **{key: cut(row[key], slice(lengths[1])) for key in ("chosen", "rejected")}}

    groups = sorted(load_task(name).items())
    random.Random(0).shuffle(groups)
    rows_of, num_pairs = {}, 0
    for group, rows in groups:
        rows = [
            row for row in map(cut_row, rows) if row["chosen"] != row["rejected"] and row["chosen"] and row["rejected"]
        ]
        rows = random.Random(group).sample(rows, min(len(rows), pairs_per_prompt))
        if rows and num_pairs < max_pairs:
            rows_of[group], num_pairs = rows, num_pairs + len(rows)
    return split_by_prompt(rows_of)
