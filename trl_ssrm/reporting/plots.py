"""Plots of a run, drawn from its files. Needs matplotlib (`pip install ".[plots]"`), not torch."""

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.files import written_aside


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Color of text and axes. In a page it is replaced by the color of the text around it, which is readable on light and dark.
INK = "#010203"
# Contrast of at least 3:1 with white and with the dark background of the report.
BLUE, ORANGE, GREEN, PURPLE, GRAY, RED = "#3a7fc8", "#cc7016", "#26946a", "#9568d0", "#868c96", "#d8463e"
SERIES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"))
STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.size": 10.0},
    # Text stays text, a `$` in the name of a dataset starts no formula, and equal runs give equal bytes.
    **{"svg.fonttype": "none", "text.parse_math": False, "svg.hashsalt": "trl-ssrm"},
}
# Held-out datasets that the temperature is fitted on. A reliability diagram on other pairs is the stricter one.
CALIBRATING = ("calibration", "cross_fit")
# Inches. Narrow, so that the text is readable on the screen of a phone.
WIDTH = 4.6

TITLES = {
    "accuracy": "Held-out accuracy by round",
    "log_loss": "Held-out log-loss by round",
    "selection": "Coverage and precision of the pseudo-labels",
    "reliability": "Reliability before and after calibration",
    "confidence": "Confidence in the pool by round",
    "margin": "Margins in the pool by round",
    "length": "Length bias of the kept pairs",
}


@dataclass(frozen=True)
class Plot:
    """
    A plot of a run.

    Args:
        name (`str`):
            Key of its title in `TITLES`, also the name of its file without the extension.
        description (`str`):
            Text with the numbers of the plot, for screen readers.
        figure ([`~matplotlib.figure.Figure`]):
            The drawing.
    """

    name: str
    description: str
    figure: "Figure"

    @property
    def title(self) -> str:
        """`str`: heading of the plot."""
        return TITLES[self.name]

    def save(self, path: Path) -> None:
        """Write the plot as a PNG file with a white background."""
        with written_aside(path) as aside:
            self.figure.savefig(aside, format="png", dpi=150, facecolor="white")
        # Drawing has computed the layout. Keeping it halves the time of drawing again.
        self.figure.set_layout_engine("none")

    @property
    def svg(self) -> str:
        """`str`: the plot as SVG for a page: transparent, as wide as its place, in the color of the text around it."""
        with _style():
            file = io.StringIO()
            self.figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator")))
        svg = file.getvalue()
        svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        # A page holds several plots, and an ID must be unique in a page.
        svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", svg)
        return re.sub(r'^<svg([^>]*?) (?:width|height)="[^"]*"([^>]*?) (?:width|height)="[^"]*"', r"<svg\1\2", svg)


def has_matplotlib() -> bool:
    """`bool`: whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def saved_plots(directory: Path) -> dict[str, Path]:
    """`dict[str, Path]`: the PNG files of plots in a directory, by title."""
    paths = {title: directory / f"{name}.png" for name, title in TITLES.items()}
    return {title: path for title, path in paths.items() if path.is_file()}


def plot_rounds(
    round_history: list[dict[str, Any]],
    path: str,
    references: dict[str, dict[str, float]] | None = None,
    name: str = "eval",
) -> None:
    """
    Draw held-out accuracy and log-loss over the rounds. Needs matplotlib (`pip install .[plots]`).

    Args:
        round_history (`list[dict[str, Any]]`):
            Facts of each round, as in [`SSRMTrainer.round_history`].
        path (`str`):
            Image file to write.
        references (`dict[str, dict[str, float]]`, *optional*):
            Metrics `accuracy` and `log_loss` of other models, by the name of the model. Drawn as horizontal lines.
        name (`str`, *optional*, defaults to `"eval"`):
            Name of the held-out dataset whose metrics are drawn.
    """
    from matplotlib.figure import Figure

    rounds = [facts["round"] for facts in round_history]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, metric, words in zip(panels, ("accuracy", "log_loss"), ("accuracy", "log-loss"), strict=True):
        panel.plot(rounds, [facts[f"{name}_{metric}"] for facts in round_history], marker="o", label="SSRM")
        for number, (title, metrics) in enumerate((references or {}).items()):
            panel.axhline(metrics[metric], linestyle="--", color=f"C{number + 1}", label=title)
        panel.set(xlabel="round", ylabel=f"held-out {words}", xticks=rounds)
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=150)


def draw_plots(
    round_history: list[dict[str, Any]],
    shown_round: dict[str, Any] | None,
    labelings: dict[int, dict[str, Any]],
    summaries: dict[int, dict[str, Any]],
) -> list[Plot]:
    """
    Draw every plot that the files of a run have data for.

    Args:
        round_history (`list[dict[str, Any]]`):
            Facts of each round, as in [`SSRMTrainer.round_history`].
        shown_round (`dict[str, Any]`, *optional*):
            Round whose calibration is drawn, with the keys `facts` and `reliability`. The latter holds, by held-out
            dataset, the curves of [`reliability_curve`] `before` and `after` temperature scaling.
        labelings (`dict[int, dict[str, Any]]`):
            Facts of each labeling of the pool, by the round that trains on its pairs.
        summaries (`dict[int, dict[str, Any]]`):
            Summaries by [`summarize_labeling`], by the same rounds.

    Returns:
        `list[Plot]`: the plots in the order of `TITLES`.
    """
    with _style():
        plots = [_metric_plot(round_history, metric) for metric in ("accuracy", "log_loss")]
        plots += [_selection_plot(labelings), _reliability_plot(shown_round)]
        plots += [_histogram_plot(name, summaries, labelings) for name in ("confidence", "margin", "length")]
    return [plot for plot in plots if plot is not None]


def held_out_names(facts: dict[str, Any]) -> list[str]:
    """`list[str]`: names of the held-out datasets of a round, sorted, those that fit the temperature last."""
    names = [name.removesuffix("_log_loss") for name in facts if name.endswith("_log_loss")]
    names = [name for name in names if not name.endswith("_calibrated")]
    return sorted(names, key=_calibrating_last)


def _calibrating_last(name: str) -> tuple[bool, str]:
    return name in CALIBRATING, name


def in_words(name: str) -> str:
    """`str`: name of a held-out dataset as a table or a legend shows it."""
    return {"cross_fit": "labels, by fold models"}.get(name, f"{name.replace('_', ' ')} pairs")


def _metric_plot(history: list[dict[str, Any]], metric: str) -> Plot | None:
    names = held_out_names(history[0]) if history else []
    if not names:
        return None
    words, rounds = metric.replace("_", "-"), [facts["round"] for facts in history]
    figure, axes = _figure(3.2)
    described = []
    for number, name in enumerate(names):
        color, marker = SERIES[number % len(SERIES)]
        kinds: list[tuple[str, str, dict[str, Any]]] = [(f"{name}_{metric}", in_words(name), {})]
        if (calibrated := f"{name}_calibrated_{metric}") in history[0]:
            kinds.append((calibrated, f"{in_words(name)}, calibrated", {"ls": ":", "mfc": "none"}))
        for key, label, style in kinds:
            # Fold models measure round 0 alone, and a temperature of 1 calibrates nothing.
            known = {facts["round"]: facts[key] for facts in history if key in facts}
            axes.plot(list(known), list(known.values()), color=color, marker=marker, label=label, **style)
            described.append(f"{label} {_numbers(list(known.values()))}")
        if f"{name}_{metric}" in history[-1] and len(rounds) > 1:
            # One entry of the legend stands for the lines of all datasets.
            axes.axhline(
                history[0][f"{name}_{metric}"],
                color=GRAY if len(names) == 1 else color,
                ls="--",
                label="round 0" if number == len(names) - 1 else None,
            )
    axes.set(xlabel="round", ylabel=f"held-out {words}", xticks=rounds)
    _legend(axes)
    reference = " Dashed: round 0, before the first pseudo-labels." if len(rounds) > 1 else ""
    return Plot(metric, f"Held-out {words} from round 0 on: {'; '.join(described)}.{reference}", figure)


def _selection_plot(labelings: dict[int, dict[str, Any]]) -> Plot | None:
    if not labelings:
        return None
    figure, axes = _figure(3.9)
    labels = {"coverage": "coverage", "pseudo_label_accuracy": "precision", "mean_confidence": "mean confidence"}
    described = []
    for (name, label), (color, marker) in zip(labels.items(), SERIES, strict=False):
        known = {round: facts[name] for round, facts in labelings.items() if name in facts}
        if known:
            axes.plot(list(known), list(known.values()), color=color, marker=marker, label=label)
            described.append(f"{label}, {_by_round(known)}")
    axes.set(xlabel="round that trains on the kept pairs", ylabel="share", xticks=list(labelings), ylim=(-0.03, 1.03))
    _legend(axes)
    return Plot("selection", f"{'; '.join(described).capitalize()}.", figure)


def _reliability_plot(shown_round: dict[str, Any] | None) -> Plot | None:
    if shown_round is None or not shown_round["reliability"]:
        return None
    from matplotlib.figure import Figure

    reliability = shown_round["reliability"]
    name = min(reliability, key=_calibrating_last)
    curves, place = reliability[name], f"{in_words(name)}, round {shown_round['facts']['round']}"
    if curves["before"] == curves["after"]:
        curves = {"uncalibrated": curves["before"]}
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0.5, 1], [0.5, 1], color=GRAY, ls="--", label="perfect calibration")
    described = []
    for (when, curve), (color, marker) in zip(curves.items(), SERIES, strict=False):
        confidence, accuracy, count = ([each[key] for each in curve] for key in ("confidence", "accuracy", "count"))
        words = f"{when} the temperature" if when in ("before", "after") else when
        axes.plot(confidence, accuracy, color=color, marker=marker, label=words)
        below.plot(confidence, count, color=color, marker=marker, ms=4, ls=":")
        points = (f"{sure:.2f}: {right:.2f}" for sure, right in zip(confidence, accuracy, strict=True))
        described.append(f"{words}, {', '.join(points)}")
    lowest = min(each["accuracy"] for curve in curves.values() for each in curve)
    axes.set(ylabel=f"accuracy ({place})", xlim=(0.49, 1.01), ylim=(min(0.5, lowest) - 0.03, 1.03))
    axes.yaxis.label.set_fontsize(9)
    below.set(xlabel="confidence", ylabel="pairs", ylim=(0, None))
    below.grid(alpha=0.3)
    _legend(axes)
    return Plot("reliability", f"Accuracy by confidence ({place}): {'; '.join(described)}.", figure)


def _histogram_plot(name: str, summaries: dict[int, Any], labelings: dict[int, dict[str, Any]]) -> Plot | None:
    summaries = {round: summary for round, summary in summaries.items() if name in summary["histograms"]}
    if not summaries:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.9 + 1.35 * len(summaries)), layout="constrained")
    rows = figure.subplots(len(summaries), 1, sharex=True, squeeze=False)[:, 0]
    described = []
    for axes, (round, summary) in zip(rows, summaries.items(), strict=True):
        histogram = summary["histograms"][name]
        if name == "length":
            note = _draw_lengths(axes, histogram, labelings.get(round, {}))
        else:
            note = _draw_counts(axes, histogram, _threshold_on_axis(name, summary))
        title = f"round {round}{note}"
        axes.set_title(title, loc="left", fontsize=10)
        sizes = [f"{sum(histogram[key])} {words}" for key, words in _GROUP_IN_WORDS.items() if key in histogram]
        described.append(f"{title}: {', '.join(sizes)}")
    rows[-1].set_xlabel(_AXES[name])
    handles, labels = rows[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=9)
    return Plot(name, f"Histograms of the {_AXES[name]}. {'; '.join(described)}.", figure)


def _draw_lengths(axes: "Axes", histogram: dict[str, list], facts: dict[str, Any]) -> str:
    """`str`: what to add to the title: how often the preferred completion is longer."""
    # Shares of each group, because the kept pairs are fewer than the pool.
    axes.stairs(_shares(histogram["pool"]), histogram["edges"], color=GRAY, lw=1.5, label="pool")
    axes.stairs(_shares(histogram["kept"]), histogram["edges"], color=BLUE, fill=True, alpha=0.6, label="kept")
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_ylabel("share")
    of = {"kept": facts.get("chosen_longer"), "pool": facts.get("chosen_longer_in_pool")}
    longer = ", ".join(f"{share:.0%} of {group}" for group, share in of.items() if share is not None)
    return f" · preferred is longer: {longer}" if longer else ""


def _draw_counts(axes: "Axes", histogram: dict[str, list], threshold: float | None) -> str:
    """`str`: what to add to the title: the threshold."""
    edges = histogram["edges"]
    axes.stairs(histogram["pool"], edges, color=GRAY, fill=True, alpha=0.55, label="pool")
    axes.stairs(histogram["kept"], edges, color=BLUE, fill=True, label="kept")
    if "wrong" in histogram:
        axes.stairs(histogram["wrong"], edges, color=RED, fill=True, label="kept and wrong")
    axes.set_ylabel("pairs")
    if threshold is None:
        return ""
    axes.axvline(threshold, color=INK, ls="--", lw=1, label="threshold")
    return f" · threshold {threshold:.3f}"


def _threshold_on_axis(name: str, summary: dict[str, Any]) -> float | None:
    """`float` or `None`: the threshold as a confidence, or as the margin that has this confidence."""
    threshold = summary["threshold"]
    # A threshold of 1 keeps nothing, and no margin reaches it.
    if threshold is None or threshold >= 1:
        return None
    return threshold if name == "confidence" else summary["temperature"] * math.log(threshold / (1 - threshold))


_GROUP_IN_WORDS = {"pool": "pairs in the pool", "kept": "kept", "wrong": "kept and wrong"}
_AXES = {
    "confidence": "confidence in the pseudo-label",
    "margin": "margin of the pseudo-label, a pair logit",
    "length": "length difference in tokens, preferred minus other",
}


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def _figure(height: float) -> "tuple[Figure, Axes]":
    # Not by pyplot, which keeps every figure in memory and may need a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _legend(axes: "Axes") -> None:
    axes.grid(alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9)


def _shares(counts: list[int]) -> list[float]:
    return [count / max(1, sum(counts)) for count in counts]


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _by_round(values: dict[int, float]) -> str:
    return ", ".join(f"round {round} {value:.3f}" for round, value in values.items())
