"""The rounds of a run as they go by: a table in a terminal, a line a round elsewhere."""

import sys
import time
from typing import Any

from accelerate import Accelerator
from transformers.utils import is_rich_available

from .report import round_line


if is_rich_available():
    from rich import box
    from rich.console import Console
    from rich.table import Table


# Held-out pairs that accuracy and ECE are of, the first that a run has.
_HELD_OUT = ("eval", "calibration", "cross_fit")


class RoundProgress:
    """
    Tells a person how the rounds go, from the main process.

    In a terminal, the table of the rounds so far is shown after each of them: between two rounds stand the bars and
    logs of training and scoring, under which a single line would be far from its header. Where there is no terminal, no
    rich, or no wish for bars, each round is a plain line.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Whose main process prints.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether bars are off, and the table with them.
        console ([`~rich.console.Console`], *optional*):
            Where to print. If `None`, on the standard output.
    """

    def __init__(self, accelerator: Accelerator, disable_tqdm: bool = False, console: "Console | None" = None):
        self.accelerator = accelerator
        self.console = console or (Console() if is_rich_available() else None)
        self.has_table = self.console is not None and self.console.is_terminal and not disable_tqdm
        # Of the rounds that this process has seen; a resumed run does not know how long the others took.
        self.seconds: dict[int, float] = {}
        self._start = time.perf_counter()

    def end_round(self, round_history: list[dict[str, Any]]) -> None:
        """
        Show a round that has ended.

        Args:
            round_history (`list[dict[str, Any]]`):
                Facts of each round so far, as in [`SSRMTrainer.round_history`].
        """
        now = time.perf_counter()
        self.seconds[round_history[-1]["round"]], self._start = now - self._start, now
        if not self.accelerator.is_main_process:
            return
        if self.has_table:
            assert self.console is not None
            # The bars are on the standard error, and the last of them may not have ended its line.
            sys.stderr.flush()
            self.console.print(rounds_so_far(round_history, self.seconds))
        else:
            self.accelerator.print(round_line(round_history[-1]))


def rounds_so_far(round_history: list[dict[str, Any]], seconds: dict[int, float]) -> "Table":
    """
    The rounds of a run as a table for a terminal.

    Args:
        round_history (`list[dict[str, Any]]`):
            Facts of each round, as in [`SSRMTrainer.round_history`].
        seconds (`dict[int, float]`):
            How long a round took, where that is known: labeling, training, folds and measuring.

    Returns:
        [`~rich.table.Table`]: a line a round, at most 72 characters wide; precision is that of the pseudo-labels where
        gold labels are tracked, accuracy and ECE are on the first of `eval_dataset`, `calibration_dataset` and the folds
        that there is, and a dash is what is not known.
    """
    names = set(round_history[0])
    held_out = next((name for name in _HELD_OUT if f"{name}_accuracy" in names), None)
    if held_out is None:
        held_out = next((n.removesuffix("_accuracy") for n in sorted(names) if n.endswith("_accuracy")), "eval")
    # The ECE of the confidence that selects, which is that after calibration.
    ece = f"{held_out}_calibrated_ece" if f"{held_out}_calibrated_ece" in names else f"{held_out}_ece"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="", caption_justify="left")
    table.caption = f"accuracy and ECE on {held_out.replace('_', ' ')} pairs"
    for title in ("round", "kept", "coverage", "precision", "accuracy", "ECE", "time"):
        table.add_column(title, justify="right", no_wrap=True)
    for facts in round_history:
        shares = [facts.get(name) for name in ("coverage", "pseudo_label_accuracy", f"{held_out}_accuracy", ece)]
        cells = ["–" if share is None else f"{share:.3f}" for share in shares]
        kept = f"{facts['kept']:,}" if "kept" in facts else "–"
        table.add_row(str(facts["round"]), kept, *cells, _duration(seconds.get(facts["round"])))
    return table


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
