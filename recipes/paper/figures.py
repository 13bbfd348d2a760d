"""The table and the four figures of paper.py, from the facts of the trained shares and the results of measuring them."""

from pathlib import Path
from typing import Any


def name_of(fraction: float) -> str:
    return "all" if fraction == 1 else f"1/{1 / fraction:.3g}"


def values(results: list[dict[str, Any]], what: str) -> dict[tuple[float, int], dict[str, Any]]:
    """Results of one kind by share of labels and round."""
    return {(result["fraction"], result["round"]): result for result in results if result["what"] == what}


def name_of_bench(bench: dict[tuple[float, int], dict[str, Any]]) -> str:
    """RewardBench, or what stands for it where some of its subsets are missing."""
    return (
        "RewardBench" if all(result["is_whole"] for result in bench.values()) else "Accuracy on parts of RewardBench"
    )


def table(trained: list[dict[str, Any]], results: list[dict[str, Any]]) -> str:
    """One line a share and round, as Markdown; "–" is not measured."""
    bench, wins = values(results, "rewardbench"), values(results, "win rate")
    titles = [
        "Labels",
        "Pairs labeled",
        "Round",
        "Pairs kept",
        "Held-out accuracy",
        "Log-loss",
        "ECE",
        name_of_bench(bench),
        "Win rate",
    ]
    lines = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 1)]
    for share in trained:
        for facts in share["rounds"]:
            key = share["fraction"], facts["round"]
            cells = [
                name_of(key[0]),
                f"{share['num_labels']:,}",
                str(key[1]),
                f"{facts['kept']:,}" if "kept" in facts else "–",
            ]
            for metric in ("accuracy", "log_loss", "ece"):
                cells.append(f"{facts[f'eval_{metric}']:.3f}" if f"eval_{metric}" in facts else "–")
            cells.append(f"{bench[key]['value']:.3f}" if key in bench else "–")
            win = wins.get(key)
            cells.append(f"{win['value']:.3f} ± {1.96 * win['error']:.3f}" if win else "–")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(trained: list[dict[str, Any]], results: list[dict[str, Any]], directory: Path) -> list[Path]:
    """Draw the four figures as far as there is something to draw, and give their files."""
    from matplotlib.figure import Figure

    with_pool = [share for share in trained if "reliability" in share["rounds"][0]]
    figures = {
        "rewardbench": (_draw_bench, [trained], values(results, "rewardbench")),
        "reliability": (_draw_reliability, with_pool, with_pool),
        "confidence": (
            _draw_confidence,
            with_pool,
            [f for s in with_pool for f in s["rounds"] if f.get("confidence")],
        ),
        "win_rates": (_draw_wins, [trained], values(results, "win rate")),
    }
    paths = []
    for name, (draw_panel, panels, what) in figures.items():
        if not what:
            continue
        figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw_panel(axes, panel, what)
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def _draw_bench(axes: Any, trained: list[dict[str, Any]], bench: dict[tuple[float, int], dict[str, Any]]) -> None:
    for label, place in (("labels alone", 0), ("SSRM, last round", -1)):
        keys = [(share["fraction"], share["rounds"][place]["round"]) for share in trained]
        keys = [key for key in keys if key in bench]
        axes.plot([fraction for fraction, _ in keys], [bench[key]["value"] for key in keys], marker="o", label=label)
    axes.set(
        xscale="log", xlabel="share of the labels", ylabel="score", title=f"{name_of_bench(bench)} by share of labels"
    )
    axes.legend()


def _draw_reliability(axes: Any, share: dict[str, Any], _: Any) -> None:
    for label, place in (("labels alone", 0), ("last round", -1)):
        curve = share["rounds"][place]["reliability"]
        axes.plot([p["confidence"] for p in curve], [p["accuracy"] for p in curve], marker="o", label=label)
    axes.plot([0.5, 1], [0.5, 1], color="gray", linewidth=1)
    axes.set(
        xlabel="confidence", ylabel="accuracy", title=f"Held-out pairs, {name_of(share['fraction'])} of the labels"
    )
    axes.legend()


def _draw_confidence(axes: Any, share: dict[str, Any], _: Any) -> None:
    for facts in share["rounds"]:
        if histogram := facts.get("confidence"):
            parts = [count / sum(histogram["pool"]) for count in histogram["pool"]]
            axes.stairs(parts, histogram["edges"], label=f"labeled for round {facts['round']}")
    axes.set(
        xlabel="confidence", ylabel="share of the pool", title=f"Pool, {name_of(share['fraction'])} of the labels"
    )
    axes.legend()


def _draw_wins(axes: Any, trained: list[dict[str, Any]], wins: dict[tuple[float, int], dict[str, Any]]) -> None:
    keys = sorted(wins)
    errors = [1.96 * wins[key]["error"] for key in keys]
    axes.errorbar(range(len(keys)), [wins[key]["value"] for key in keys], yerr=errors, fmt="o")
    axes.axhline(0.5, color="gray", linewidth=1)
    names = [f"{name_of(fraction)},\nround {round}" for fraction, round in keys]
    axes.set(
        xticks=range(len(keys)), xticklabels=names, ylabel="win rate over the base", title="Policies by reward model"
    )
