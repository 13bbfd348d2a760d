import io
import re

import pytest
from accelerate import Accelerator
from rich.console import Console

from trl_ssrm import SSRMTrainer
from trl_ssrm.reporting.progress import RoundProgress, rounds_so_far
from trl_ssrm.reporting.verdict import round_line


HISTORY = [
    {
        **{"round": 0, "eval_accuracy": 0.7, "eval_ece": 0.1, "eval_calibrated_ece": 0.05, "cross_fit_accuracy": 0.6},
        **{"eval_log_loss": 0.6, "eval_pairs": 100, "num_train_pairs": 96},
    },
    {
        **{"eval_log_loss": 0.5, "eval_pairs": 100, "num_train_pairs": 9_096},
        **{
            f"eval_{name}": 0.1
            for name in ("accuracy_change", "accuracy_change_error", "log_loss_change", "log_loss_change_error")
        },
        **{"round": 1, "eval_accuracy": 0.75, "eval_ece": 0.2, "eval_calibrated_ece": 0.04, "cross_fit_accuracy": 0.6},
        **{"pool_size": 12_000, "kept": 9_000, "coverage": 0.75, "pseudo_label_accuracy": 0.9},
    },
]


def lines_of(output: str) -> list[list[str]]:
    """Words of each line that is not drawn."""
    return [line.split() for line in output.splitlines() if line.strip(" ─")]


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)


def test_table_grows_by_a_line_a_round(terminal):
    progress = RoundProgress(Accelerator(cpu=True), console=terminal)
    progress.end_round(HISTORY[:1])
    header = ["round", "kept", "coverage", "precision", "accuracy", "ECE", "time"]
    first = ["0", "–", "–", "–", "0.700", "0.050", "0:00"]
    caption = "accuracy and ECE on eval pairs".split()
    assert lines_of(terminal.file.getvalue()) == [header, first, caption]
    terminal.file.truncate(0)
    terminal.file.seek(0)
    progress.end_round(HISTORY)
    second = ["1", "9,000", "0.750", "0.900", "0.750", "0.040", "0:00"]
    assert lines_of(terminal.file.getvalue()) == [header, first, second, caption]


def test_columns_are_aligned_and_fit_a_terminal(terminal):
    terminal.print(rounds_so_far(HISTORY, {0: 5.0, 1: 3725.0}))
    lines = [line for line in terminal.file.getvalue().splitlines() if line.strip()]
    assert max(map(len, lines)) <= 72 and "1:02:05" in lines[3]
    ends = [[match.end() for match in re.finditer(r"\S+", line)] for line in lines if not line.startswith("acc")]
    assert ends[0] == ends[2] == ends[3]


@pytest.mark.parametrize("held_out", ["eval", "calibration", "cross_fit", "eval_other"])
def test_accuracy_is_on_the_first_held_out_pairs_that_there_are(terminal, held_out):
    facts = {"round": 0, f"{held_out}_accuracy": 0.7, f"{held_out}_log_loss": 0.6, f"{held_out}_ece": 0.1}
    terminal.print(rounds_so_far([facts], {}))
    assert lines_of(terminal.file.getvalue())[1] == ["0", "–", "–", "–", "0.700", "0.100", "–"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_plain_lines_without_a_terminal_or_without_bars(is_terminal, capsys):
    console = Console(force_terminal=is_terminal)
    RoundProgress(Accelerator(cpu=True), disable_tqdm=is_terminal, console=console).end_round(HISTORY)
    assert capsys.readouterr().out == f"{round_line(HISTORY)}\n"


def test_run_shows_its_rounds_and_bars_in_a_terminal(llama, config, labeled, unlabeled, capsys, monkeypatch):
    monkeypatch.setattr("trl_ssrm.reporting.progress.Console", lambda: Console(force_terminal=True))
    args = config(disable_tqdm=False, num_train_epochs=1, num_folds=2, num_rounds=1, confidence_threshold=0.5)
    args.pretrain_on_pool = False
    trainer = SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled)
    trainer.train()
    captured = capsys.readouterr()
    printed = re.sub(r"\x1b\[[\d;]*m", "", captured.out)
    assert printed.count("coverage   precision") == 2 and f" {trainer.round_history[1]['kept']} " in printed
    assert "accuracy and ECE on labels, by fold models" in printed
    # A bar for each model of round 0, the round's own and those of two folds, and for what is scored.
    assert len(re.findall(r"100%\S+ (?:4/4|2/2) ", captured.err)) >= 3 and "Scoring unlabeled_dataset" in captured.err


@pytest.mark.parametrize(("settings", "is_shown"), [({}, False), ({"log_level": "info"}, True)])
@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_logs_of_the_steps_are_on_the_console_only_if_asked_for(
    make_trainer, capsys, settings, is_shown, disable_tqdm
):
    trainer = make_trainer(**settings, num_rounds=0, disable_tqdm=disable_tqdm)
    trainer.train()
    printed = capsys.readouterr()
    assert ("grad_norm" in printed.out + printed.err) == is_shown
    assert "Round 0" in printed.out and any("grad_norm" in log for log in trainer.state.log_history)
