"""What the model card tells of the rounds."""

import re
import shutil
from pathlib import Path
from typing import Any

from .plots import saved_plots
from .report import round_table


def trained_on(round_history: list[dict[str, Any]], model: str, sources: dict[str, str]) -> str:
    """
    Say what a model was trained on.

    Args:
        round_history (`list[dict[str, Any]]`):
            Facts of each round, as in [`SSRMTrainer.round_history`].
        model (`str`):
            Model that the training started from.
        sources (`dict[str, str]`):
            Files or dataset IDs of `"labels"` and `"pool"`, as far as they are known, and the model of a `"teacher"`.

    Returns:
        `str`: one sentence.
    """
    pool = next((facts["pool_size"] for facts in round_history if "pool_size" in facts), None)
    parts = {"labels": f"{round_history[0]['num_train_pairs']:,} labeled pairs"}
    if pool is not None:
        parts["pool"] = f"{pool:,} unlabeled pairs"
    named = [f"{words} ({sources[name]})" if name in sources else words for name, words in parts.items()]
    by_teacher = f", which {sources['teacher']} has labeled" if "teacher" in sources else ""
    return f"Trained from {model} on {' and '.join(named)}{by_teacher}."


def add_rounds(card: Path, model: str, round_history: list[dict[str, Any]], words: list[str]) -> None:
    """
    Write the verdict, the table of the rounds and the plots of the report into a model card, and say what the model was
    trained on.

    Args:
        card (`Path`):
            Model card that [`~transformers.Trainer`] wrote, with the plots in `plots/` beside it.
        model (`str`):
            Model that the training started from, a directory or an ID.
        round_history (`list[dict[str, Any]]`):
            Facts of each round, as in [`SSRMTrainer.round_history`].
        words (`list[str]`):
            The sentences of [`~trl_ssrm.reporting.verdict.verdict`], and of [`trained_on`].
    """
    text, heading = card.read_text(encoding="utf-8"), "### Framework versions"
    plots = saved_plots(card.parent / "plots")
    images = "".join(f"![{title}](plots/{path.name})\n\n" for title, path in plots.items())
    # TRL names a base model on the hub only, and a repository on the hub in the snippet.
    text = re.sub(r"\[None\]\(https://huggingface.co/None\)", lambda _: f"`{model}`", text)
    text = text.replace('pipeline(model="None"', f'pipeline("text-classification", model="{card.parent}"')
    text = text.replace("## Quick start", "\n".join([*words, "", "## Quick start"]), 1)
    section = f"### Rounds\n\n{round_table(round_history)}\n\n{images}"
    card.write_text(text.replace(heading, section + heading, 1), encoding="utf-8")


def copy_card(source: Path, target: Path) -> None:
    """
    Copy a model card and its plots to another directory.

    Args:
        source (`Path`):
            Directory with the card. Nothing is done if there is none.
        target (`Path`):
            Directory to copy to. Nothing is done if it is the same.
    """
    card = source / "README.md"
    if not card.is_file() or source.resolve() == target.resolve():
        return
    shutil.copyfile(card, target / "README.md")
    for plot in saved_plots(source / "plots").values():
        (target / "plots").mkdir(exist_ok=True)
        shutil.copyfile(plot, target / "plots" / plot.name)
