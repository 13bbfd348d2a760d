"""What a run tells a person: the table of its rounds, and a picture of them."""

from typing import Any


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
    names = {name for facts in round_history for name in facts}
    columns = dict(_COLUMNS)
    for metric, words in _METRICS.items():
        own = {name for name in names if name.endswith(f"_{metric}") and name not in _COLUMNS}
        for name in sorted(name for name in own if "_adaptive_" not in name):
            columns[name] = f"{name.removesuffix(f'_{metric}').replace('_', ' ').capitalize()} {words}"
    columns = {name: title for name, title in columns.items() if name in names}
    lines = [list(columns.values()), ["---:"] * len(columns)]
    lines += [[_in_cell(facts.get(name)) for name in columns] for facts in round_history]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


def plot_rounds(
    round_history: list[dict[str, Any]],
    path: str,
    references: dict[str, dict[str, float]] | None = None,
    name: str = "eval",
) -> None:
    """
    Draw held-out accuracy and log-loss over the rounds. Needs matplotlib (`pip install trl-ssrm[plots]`).

    Args:
        round_history (`list[dict[str, Any]]`):
            Facts of each round, as in [`SSRMTrainer.round_history`].
        path (`str`):
            Image file to write.
        references (`dict[str, dict[str, float]]`, *optional*):
            Metrics of other models by their name, with the keys `accuracy` and `log_loss`, drawn as level lines.
        name (`str`, *optional*, defaults to `"eval"`):
            Held-out set whose metrics are drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rounds = [facts["round"] for facts in round_history]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for panel, metric, words in zip(panels, ("accuracy", "log_loss"), ("accuracy", "log-loss"), strict=True):
        panel.plot(rounds, [facts[f"{name}_{metric}"] for facts in round_history], marker="o", label="SSRM")
        for number, (title, metrics) in enumerate((references or {}).items()):
            panel.axhline(metrics[metric], linestyle="--", color=f"C{number + 1}", label=title)
        panel.set(xlabel="round", ylabel=f"held-out {words}", xticks=rounds)
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
