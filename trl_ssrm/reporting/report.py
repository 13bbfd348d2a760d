"""The table of the rounds of a run and its report, made from the files of the run alone. Needs no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..io.files import read_record, written_aside
from .plots import draw_plots, has_matplotlib
from .verdict import verdict


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
        `str`: a row for each round. A fact that no round has gets no column; a round without the fact gets a dash.
    """
    columns = _columns(round_history)
    lines = [list(columns.values()), ["---:"] * len(columns)]
    lines += [[_in_cell(facts.get(name)) for name in columns] for facts in round_history]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _columns(round_history: list[dict[str, Any]]) -> dict[str, str]:
    """`dict[str, str]`: title of each column, by the name of the fact that it shows."""
    names = {name for facts in round_history for name in facts}
    columns = dict(_COLUMNS)
    for metric, words in _METRICS.items():
        own = {name for name in names if name.endswith(f"_{metric}") and name not in _COLUMNS}
        for name in sorted(name for name in own if "_adaptive_" not in name):
            columns[name] = f"{name.removesuffix(f'_{metric}').replace('_', ' ').capitalize()} {words}"
    return {name: title for name, title in columns.items() if name in names}


def _in_cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class RunFiles:
    """
    Contents of the files of a run.

    Args:
        settings (`dict[str, Any]`):
            Settings of the run and fingerprints of its data.
        rounds (`list[dict[str, Any]]`):
            `facts`, `reliability` and `versions` of each finished round.
        labelings (`dict[int, dict[str, Any]]`):
            Facts of each labeling of the pool, by the round that trains on its pairs. The last of these rounds may be
            unfinished.
        summaries (`dict[int, dict[str, Any]]`):
            Summaries by [`~trl_ssrm.rounds.labeling_summary.summarize_labeling`], by the same rounds.
        end (`dict[str, Any]`, *optional*):
            `termination_reason`, `kept_round` and `trained_on` of a finished run, otherwise `None`.
    """

    settings: dict[str, Any]
    rounds: list[dict[str, Any]]
    labelings: dict[int, dict[str, Any]]
    summaries: dict[int, dict[str, Any]]
    end: dict[str, Any] | None

    @property
    def round_history(self) -> list[dict[str, Any]]:
        """`list[dict[str, Any]]`: facts of each finished round."""
        return [round["facts"] for round in self.rounds]


def read_run(output_dir: str) -> RunFiles:
    """
    Read the files of a run, which may still be training.

    Args:
        output_dir (`str`):
            Output directory of an [`SSRMTrainer`] with `unlabeled_dataset`.

    Returns:
        [`RunFiles`]

    Raises:
        ValueError: If the directory holds no run, or a file of the run is damaged.
    """
    root = Path(output_dir) / "_rounds"
    settings = _read_json(root / "run.json")
    if settings is None:
        raise ValueError(
            f"There is no run in {output_dir}; pass the `output_dir` of an `SSRMTrainer` with `unlabeled_dataset`."
        )
    rounds: list[dict[str, Any]] = []
    labelings, summaries = {}, {}
    for number in range(len(list(root.glob("round_*")))):
        directory = root / f"round_{number}"
        # The trainer writes the files in this order, so an unfinished round may lack the later ones.
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
        raise ValueError(
            f"{error}, so no report of this run can be written; put a copy of the file in its place."
        ) from None


def write_report(output_dir: str, path: str | None = None) -> str:
    """
    Write the report of a run as one self-contained HTML file, and its plots as PNG files in `plots/` beside it.

    Only the files of the run are read; neither the model nor the data is loaded. The report of an unfinished run shows
    the rounds so far. Needs matplotlib (`pip install ".[plots]"`).

    The report shows texts of the pool. So that it is not uploaded when `output_dir` is pushed to the hub, a `.gitignore`
    is written beside it, unless there is one already.

    Args:
        output_dir (`str`):
            Output directory of an [`SSRMTrainer`] with `unlabeled_dataset`.
        path (`str`, *optional*):
            File to write. If `None`, `report.html` in `output_dir`.

    Returns:
        `str`: path of the report.

    Raises:
        ValueError: If the directory holds no run, or a file of the run is damaged.
        ImportError: If matplotlib is not installed.
    """
    run = read_run(output_dir)
    if not has_matplotlib():
        raise ImportError("The report needs matplotlib; run `pip install matplotlib`.")
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


def _status(run: RunFiles) -> str:
    if run.end is None:
        return f"This run is unfinished: it is still training, or was interrupted. Finished rounds: {len(run.rounds)}."
    words = verdict(run.round_history, run.end["termination_reason"], run.end["kept_round"])
    return " ".join([*words, run.end["trained_on"]])


def _shown_round(run: RunFiles) -> dict[str, Any] | None:
    """`dict[str, Any]` or `None`: the round that the model comes from, or the last one so far."""
    if not run.rounds:
        return None
    return run.rounds[-1 if run.end is None else run.end["kept_round"]]


def _table_by_fact(round_history: list[dict[str, Any]]) -> list[list[str]]:
    """`list[list[str]]`: the transposed table of [`round_table`], a column for each round, for narrow screens."""
    columns = _columns(round_history)
    return [[title, *(_in_cell(facts.get(name)) for facts in round_history)] for name, title in columns.items()]
