"""What a run tells a person: the table of its rounds, and a report of them. Reads files alone and needs no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..io.files import read_record, written_aside
from .plots import draw_plots, has_matplotlib


_COLUMNS = {
    "round": "Round",
    "pool_size": "Pool",
    "kept": "Kept",
    "coverage": "Coverage",
    "mean_confidence": "Confidence",
    "pseudo_label_accuracy": "Pseudo-label accuracy",
    "temperature": "Temperature",
}
_METRICS = {"accuracy": "accuracy", "log_loss": "log-loss", "ece": "ECE", "brier": "Brier"}


def round_table(round_history: list[dict[str, Any]]) -> str:
    """
    Table of the rounds in Markdown.

    Args:
        round_history (`list[dict[str, Any]]`):
            Facts of each round, as in [`SSRMTrainer.round_history`].

    Returns:
        `str`: one line a round. What no round has is left out, what one round lacks is a dash.
    """
    columns = _columns(round_history)
    lines = [list(columns.values()), ["---:"] * len(columns)]
    lines += [[_in_cell(facts.get(name)) for name in columns] for facts in round_history]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _columns(round_history: list[dict[str, Any]]) -> dict[str, str]:
    """Titles of what any of the rounds has, by its name."""
    names = {name for facts in round_history for name in facts}
    columns = dict(_COLUMNS)
    for metric, words in _METRICS.items():
        own = {name for name in names if name.endswith(f"_{metric}") and name not in _COLUMNS}
        for name in sorted(name for name in own if "_adaptive_" not in name):
            columns[name] = f"{name.removesuffix(f'_{metric}').replace('_', ' ').capitalize()} {words}"
    return {name: title for name, title in columns.items() if name in names}


def round_line(facts: dict[str, Any]) -> str:
    """
    A round in one line, for a terminal.

    Args:
        facts (`dict[str, Any]`):
            Facts of the round, as in [`SSRMTrainer.round_history`].

    Returns:
        `str`: what it kept of the pool, and its held-out metrics.
    """
    kept = f", kept {facts['kept']} of {facts['pool_size']} pairs" if "kept" in facts else ""
    endings = ("_accuracy", "_log_loss", "_ece")
    held_out = [
        name for name in facts if name.endswith(endings) and not {"calibrated", "adaptive"} & {*name.split("_")}
    ]
    return f"Round {facts['round']}{kept}" + "".join(f", {name} {facts[name]:.3f}" for name in held_out)


def _in_cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class RunFiles:
    """
    What a run has left so far.

    Args:
        settings (`dict[str, Any]`):
            Settings and data that it was started with.
        rounds (`list[dict[str, Any]]`):
            `facts`, `reliability` and `versions` of each round that is over.
        labelings (`dict[int, dict[str, Any]]`):
            Facts of each labeling of the pool by the round that it was for, which may not be over.
        summaries (`dict[int, dict[str, Any]]`):
            What [`~trl_ssrm.reporting.labeling_summary.summarize_labeling`] gave, by the same.
        end (`dict[str, Any]`, *optional*):
            `termination_reason` and `kept_round`, once the run is over.
    """

    settings: dict[str, Any]
    rounds: list[dict[str, Any]]
    labelings: dict[int, dict[str, Any]]
    summaries: dict[int, dict[str, Any]]
    end: dict[str, Any] | None

    @property
    def round_history(self) -> list[dict[str, Any]]:
        """`list[dict[str, Any]]`: facts of each round that is over."""
        return [round["facts"] for round in self.rounds]


def read_run(output_dir: str) -> RunFiles:
    """
    Read what a run has left so far; it may still be going on.

    Args:
        output_dir (`str`):
            Output directory of an [`SSRMTrainer`] with `unlabeled_dataset`.

    Returns:
        [`RunFiles`]

    Raises:
        ValueError: If there is no run in the directory, or a file of it is damaged.
    """
    root = Path(output_dir) / "_rounds"
    settings = _read_json(root / "run.json")
    if settings is None:
        raise ValueError(
            f"There is no run in {output_dir}; give the `output_dir` of an `SSRMTrainer` with `unlabeled_dataset`."
        )
    rounds: list[dict[str, Any]] = []
    labelings, summaries = {}, {}
    # A labeling comes before its round is over, and the last one may have no round.
    for number in range(len(list(root.glob("round_*")))):
        directory = root / f"round_{number}"
        # Written in this order.
        if (summary := _read_json(directory / "labeling.json")) is not None:
            summaries[number] = summary
        if (facts := _read_json(directory / "pseudo_labels.json")) is not None:
            labelings[number] = facts
        if (round := _read_json(directory / "round.json")) is not None:
            rounds.append(round)
    return RunFiles(settings, rounds, labelings, summaries, _read_json(root / "end.json"))


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return read_record(path)
    except ValueError as error:
        raise ValueError(f"{error}, so there is no report of this run.") from None


def write_report(output_dir: str, path: str | None = None) -> str:
    """
    Write a report of a run, as one HTML file that needs nothing else, and its plots as PNG in `plots/` beside it.

    Reads the directory of the run alone: neither the model nor the data is loaded. Of a run that is going on, or was
    interrupted, it tells the rounds so far. Needs matplotlib (`pip install "trl-ssrm[plots]"`).

    The report shows texts of the pool. For it to stay here when the directory is pushed to the hub, a `.gitignore` is
    written beside it, which the client of the hub obeys, unless there is one.

    Args:
        output_dir (`str`):
            Output directory of an [`SSRMTrainer`] with `unlabeled_dataset`.
        path (`str`, *optional*):
            File to write. If `None`, it is `report.html` in `output_dir`.

    Returns:
        `str`: the file.

    Raises:
        ValueError: If there is no run in the directory, or a file of it is damaged.
        ImportError: If matplotlib is not installed.
    """
    run = read_run(output_dir)
    if not has_matplotlib():
        raise ImportError('The report draws with matplotlib; get it by `pip install "trl-ssrm[plots]"`.')
    target = Path(output_dir) / "report.html" if path is None else Path(path)
    plots = draw_plots(run.round_history, _shown_round(run), run.labelings, run.summaries)
    for plot in plots:
        plot.save(target.parent / "plots" / f"{plot.name}.png")
    environment = Environment(loader=PackageLoader("trl_ssrm.reporting"), autoescape=True, undefined=StrictUndefined)
    html = environment.get_template("report.html.jinja").render(
        name=Path(output_dir).resolve().name,
        status=_status(run),
        table=_table_by_fact(run.round_history),
        plots=plots,
        examples={round: summary["examples"] for round, summary in run.summaries.items()},
        settings={name: json.dumps(value, ensure_ascii=False) for name, value in run.settings.items()},
        versions=run.rounds[-1].get("versions") if run.rounds else None,
    )
    with written_aside(target) as aside:
        aside.write_text(html, encoding="utf-8")
    ignored = target.parent / ".gitignore"
    if path is None and not ignored.exists():
        ignored.write_text(f"{target.name}\n", encoding="utf-8")
    return str(target)


_REASONS = {
    "max_rounds": "all rounds are done",
    "nothing_selected": "nothing was selected for another one",
    "no_change": "the kept pairs no longer changed",
    "no_improvement": "none was better for a while",
}


def _status(run: RunFiles) -> str:
    if run.end is None:
        return f"This run is going on, or was interrupted. Rounds that are over: {len(run.rounds)}."
    # A callback of the user may end them for a reason of its own, or without one.
    reason = run.end["termination_reason"] or "no reason was given"
    words = _REASONS.get(reason, reason)
    last, kept = len(run.rounds) - 1, run.end["kept_round"]
    return f"The rounds ended after round {last}: {words}. The model is that of round {kept}."


def _shown_round(run: RunFiles) -> dict[str, Any] | None:
    """The round that the model is of, or the last one so far."""
    if not run.rounds:
        return None
    return run.rounds[-1 if run.end is None else run.end["kept_round"]]


def _table_by_fact(round_history: list[dict[str, Any]]) -> list[list[str]]:
    """The table of [`round_table`] turned, which fits on a narrow screen: a column a round."""
    columns = _columns(round_history)
    return [[title, *(_in_cell(facts.get(name)) for facts in round_history)] for name, title in columns.items()]
