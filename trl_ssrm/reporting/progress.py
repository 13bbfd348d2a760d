"""Prints three lines a round: what it trains on, what came out, and what was kept. In a terminal, a table of the rounds."""

import sys
import time
from typing import Any

from accelerate import Accelerator
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.utils import is_rich_available

from ..rounds.callback import RoundCallback
from .plots import held_out_names, in_words
from .verdict import round_line


if is_rich_available():
    from rich import box
    from rich.console import Console
    from rich.table import Table


class RoundProgress(RoundCallback):
    """
    Prints what a round trains on, what came out of it, and which pairs it has kept for the next one, in the main process.

    In a terminal, the whole table is printed again after each round, because the bars and logs of a round would separate
    a single row from the header. Without a terminal, without rich, or with `disable_tqdm`, what came out is one plain line.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the trainer; its main process prints.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to print plain lines in a terminal too.
        console ([`~rich.console.Console`], *optional*):
            Console to print on. If `None`, the standard output.
    """

    def __init__(self, accelerator: Accelerator, disable_tqdm: bool = False, console: "Console | None" = None):
        self.accelerator = accelerator
        self.console = console or (Console() if is_rich_available() else None)
        self.has_table = self.console is not None and self.console.is_terminal and not disable_tqdm
        # Seconds of the rounds that this process trained. The time of rounds before a resume is unknown.
        self.seconds: dict[int, float] = {}
        self._start: float | None = None

    def on_round_begin(self, args: Any, state: Any, control: Any, **kwargs: Any):
        # Later rounds count from the end of the round before, since labeling is part of them.
        self._start = self._start or time.perf_counter()
        kind = "labeled" if kwargs["round"] == 0 else "labeled and pseudo-labeled"
        self.accelerator.print(f"Round {kwargs['round']}: training on {kwargs['num_train_pairs']:,} {kind} pairs")

    def on_labeling_end(self, args: Any, state: Any, control: Any, **kwargs: Any):
        facts = kwargs["facts"]
        confidence = f", mean confidence {facts['mean_confidence']:.3f}" if "mean_confidence" in facts else ""
        self.accelerator.print(
            f"For round {facts['round']}: kept {facts['kept']:,} of the {facts['pool_size']:,} pairs of the pool{confidence}"
        )

    def on_round_end(self, args: Any, state: Any, control: Any, **kwargs: Any):
        self.end_round(kwargs["round_history"])

    def end_round(self, round_history: list[dict[str, Any]]) -> None:
        """
        Print the round that has ended.

        Args:
            round_history (`list[dict[str, Any]]`):
                Facts of each round so far, as in [`SSRMTrainer.round_history`].
        """
        now = time.perf_counter()
        self.seconds[round_history[-1]["round"]], self._start = now - (self._start or now), now
        if not self.accelerator.is_main_process:
            return
        if self.has_table:
            assert self.console is not None
            # The bars are written to the standard error, and the last one may still be in its buffer.
            sys.stderr.flush()
            self.console.print(rounds_so_far(round_history, self.seconds))
        else:
            self.accelerator.print(round_line(round_history))


class QuietProgressCallback(ProgressCallback):
    """[`~transformers.ProgressCallback`], whose bar is there, but not the logs of every few steps."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any):
        pass


def keep_logs_off_the_console(trainer: Trainer) -> None:
    """
    Send the logs of the steps to the trackers and the files alone, unless `log_level` is `"info"` or `"debug"`.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer whose callbacks are changed.
    """
    if trainer.args.log_level in ("info", "debug"):
        return
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(QuietProgressCallback())


def rounds_so_far(round_history: list[dict[str, Any]], seconds: dict[int, float]) -> "Table":
    """
    Make the table of the rounds for a terminal.

    Args:
        round_history (`list[dict[str, Any]]`):
            Facts of each round, as in [`SSRMTrainer.round_history`].
        seconds (`dict[int, float]`):
            Seconds that a round took, by round: labeling, training, folds and evaluation. A round may be missing.

    Returns:
        [`~rich.table.Table`]: a row for each round, at most 72 characters wide. Precision is the accuracy of the
        pseudo-labels, known if hidden labels are tracked. Accuracy and ECE are measured on `eval_dataset`, without it on
        `calibration_dataset`, without both on the folds. A dash stands for an unknown value.
    """
    names = round_history[0]
    held_out = next(iter(held_out_names(names)), "eval")
    # Pairs are selected by the calibrated confidence, so its ECE is shown where there is one.
    ece = f"{held_out}_calibrated_ece" if f"{held_out}_calibrated_ece" in names else f"{held_out}_ece"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="", caption_justify="left")
    table.caption = f"accuracy and ECE on {in_words(held_out)}"
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
