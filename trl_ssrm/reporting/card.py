"""What the model card tells of the rounds."""

import shutil
from pathlib import Path
from typing import Any

from .plots import saved_plots
from .report import round_table


def add_rounds(card: Path, round_history: list[dict[str, Any]]) -> None:
    """
    Write the table of the rounds and the plots of the report into a model card.

    Args:
        card (`Path`):
            Model card that [`~transformers.Trainer`] wrote, with the plots in `plots/` beside it.
        round_history (`list[dict[str, Any]]`):
            Facts of each round, as in [`SSRMTrainer.round_history`].
    """
    text, heading = card.read_text(encoding="utf-8"), "### Framework versions"
    plots = saved_plots(card.parent / "plots")
    images = "".join(f"![{title}](plots/{path.name})\n\n" for title, path in plots.items())
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
