"""The verdict on a run in a few sentences: did the pool help, where does the model come from, and what to do next."""

import math
from typing import Any

from ..data.formats import argument_name
from ..scoring.metrics import HALF_INTERVAL


_MOST_USEFUL = "in Python, `trainer.export_for_labeling` writes the most useful ones of the pool"


def verdict(round_history: list[dict[str, Any]], termination_reason: str | None, kept_round: int) -> list[str]:
    """
    Say what a run has come to.

    Args:
        round_history (`list[dict[str, Any]]`):
            Facts of each round, as in [`SSRMTrainer.round_history`].
        termination_reason (`str` or `None`):
            `"max_rounds"`, `"nothing_selected"`, `"nothing_learned"`, `"no_change"` or `"callback"`; `None` if the rounds have not
            ended.
        kept_round (`int`):
            The round whose weights the model has.

    Returns:
        `list[str]`: sentences. The first one says whether the pool helped, by the first held-out dataset of the run. The log-loss of a
        round is that with or without its temperature, whichever is lower.
        Intervals are 95 % intervals of paired differences on its pairs, over its prompts.
    """
    first, kept, last = round_history[0], round_history[kept_round], round_history[-1]
    name = held_out_name(first)
    sentences = [
        _effect(first, kept, name),
        _pretraining(first),
        _linear_model(first, last),
        _origin(termination_reason, last["round"], kept_round, first),
        _selection(termination_reason, last),
        _next(kept, name, kept_round),
    ]
    return [words for words in sentences if words is not None]


def round_line(round_history: list[dict[str, Any]]) -> str:
    """
    Say in one line what the last round has come to.

    Args:
        round_history (`list[dict[str, Any]]`):
            Facts of each round so far, as in [`SSRMTrainer.round_history`].

    Returns:
        `str`: accuracy and log-loss on the first held-out dataset, and their changes since round 0; those on the labels that fold models have not seen, if nothing is held out.
    """
    first, last = round_history[0], round_history[-1]
    name, opening = held_out_name(first), f"Round {last['round']}:"
    if name is not None and last["round"] > 0:
        changes = ", ".join(_change(first, last, name, key, words) for key, words in _METRICS.items())
        pairs = f"{first[f'{name}_pairs']:,} held-out pairs (`{argument_name(name)}`)"
        return f"{opening} {changes}, against {_baseline(first)}, on {pairs}"
    name = name or ("cross_fit" if last["round"] == 0 and "cross_fit_accuracy" in first else None)
    if name is None:
        return f"{opening} trained on {last['num_train_pairs']:,} pairs; nothing is held out to measure it"
    pairs = "labels, by fold models" if name == "cross_fit" else f"held-out pairs (`{argument_name(name)}`)"
    return f"{opening} {_numbers(last, name, ', ')}, on {last[f'{name}_pairs']:,} {pairs}"


def held_out_name(facts: dict[str, Any]) -> str | None:
    """`str` or `None`: the held-out dataset that the verdict speaks of: one to evaluate on, or else the calibration pairs."""
    names = sorted(key.removesuffix("_accuracy") for key in facts if key.endswith("_accuracy"))
    evaluated = [name for name in names if name == "eval" or name.startswith("eval_")]
    return evaluated[0] if evaluated else ("calibration" if "calibration" in names else None)


def _effect(first: dict[str, Any], kept: dict[str, Any], name: str | None) -> str:
    if name is None:
        return "Whether the pool helped is not known, since there are no held-out pairs."
    pairs = f"{first[f'{name}_pairs']:,} held-out pairs (`{argument_name(name)}`)"
    if kept["round"] == 0:
        return f"The model has learned from {_baseline(first)}: {_numbers(first, name, ' and ')} on {pairs}."
    effects = [_direction(kept, name, "accuracy", 1), _direction(kept, name, "log_loss", -1)]
    opening = {
        (1, 1): "The pseudo-labels helped",
        (0, 1): "The pseudo-labels helped",
        (1, 0): "The pseudo-labels helped",
        (0, 0): "The pseudo-labels made no difference that these pairs can show",
        (0, -1): "The pseudo-labels did harm",
        (-1, 0): "The pseudo-labels did harm",
        (-1, -1): "The pseudo-labels did harm",
        (1, -1): "The pseudo-labels raised the accuracy and made the probabilities worse",
        (-1, 1): "The pseudo-labels lowered the accuracy and made the probabilities better",
    }[effects[0], effects[1]]
    changes = ", ".join(_change(first, kept, name, key, words) for key, words in _METRICS.items())
    return f"{opening}: {changes}, against {_baseline(first)}, on {pairs}."


def _baseline(first: dict[str, Any]) -> str:
    """What round 0 has learned from, which later rounds are compared with."""
    return "pretraining and the labels" if first.get("is_pretrained") else "the labels alone"


_METRICS = {"accuracy": "accuracy", "log_loss": "log-loss"}


def _direction(kept: dict[str, Any], name: str, metric: str, good: int) -> int:
    """1 if the metric is better than after round 0 beyond its interval, -1 if it is worse, otherwise 0."""
    change = kept[f"{name}_{metric}_change"]
    is_clear = abs(change) > _half(kept[f"{name}_{metric}_change_error"])
    return (good if change > 0 else -good) if is_clear else 0


def _change(first: dict[str, Any], kept: dict[str, Any], name: str, metric: str, words: str) -> str:
    before, after = (_value(facts, name, metric) for facts in (first, kept))
    key = f"{name}_{metric}_change"
    return _from_to(words, before, after, kept[key], kept[f"{key}_error"])


def _from_to(words: str, before: float, after: float, change: float, error: float | None) -> str:
    sign = "+" if change >= 0 else "−"
    return f"{words} {_number(before)} to {_number(after)} ({sign}{_number(abs(change))} ± {_number(_half(error))})"


def _half(error: float | None) -> float:
    """Half of an interval. The standard error of a single value is infinite, which JSON has no number for."""
    return math.inf if error is None else HALF_INTERVAL * error


def _origin(reason: str | None, last: int, kept: int, first: dict[str, Any]) -> str:
    """Why the rounds ended, and which round the model comes from."""
    reasons = {
        "max_rounds": f"Round {last} was the last one",
        "nothing_selected": f"After round {last} nothing was selected",
        "nothing_learned": f"After round {last} the predictions on labels that the model had not seen were no better than 0.5 for "
        "every pair (their log-loss was less than 0.01 lower), so the pool was not labeled",
        "no_change": f"After round {last} the same pairs were kept with the same labels as before",
        "callback": f"A callback ended the rounds after round {last}",
        None: f"The rounds ended after round {last}",
    }
    # A trainer of one's own may stop for reasons of its own.
    why = reasons.get(reason, f"The rounds ended after round {last} ({reason})")
    model = (
        f"from round {kept}" if kept else f"from round 0, which was trained on the {first['num_train_pairs']:,} labels"
    )
    if kept == last:
        return f"{why}; the model is {model}."
    return f"{why}; round {kept} had the lowest log-loss on `calibration_dataset`, so the model is {model}."


def _selection(reason: str | None, last: dict[str, Any]) -> str | None:
    """Why nothing was selected, and what to change."""
    if reason != "nothing_selected":
        return None
    if "highest_precision" in last:
        floor = math.floor(last["highest_precision"] * 100) / 100
        more = f"about {last['labels_needed']:,}" if "labels_needed" in last else "more"
        give = f"give {more} labels" + (" in all" if more != "more" else "")
        lower = f"Set it to {floor:.2f}, or {give}" if floor > 0.5 else give.capitalize()
        return (
            f"The highest precision that the held-out labels can confirm is {_number(last['highest_precision'])}, and "
            f"`target_precision` asks for {_number(last['target_precision'])}. {lower}."
        )
    return "Lower `confidence_threshold`, or train round 0 longer. `pseudo_label_type='soft'` without a threshold uses every pair."


def _pretraining(first: dict[str, Any]) -> str | None:
    if "pretraining_share_right" not in first:
        return None
    opening = f"Pretraining on the texts of the pool was {'' if first['is_pretrained'] else 'not '}used"
    if "log_loss_with_pretraining" not in first:
        asked = " as asked" if first["is_pretrained"] else ""
        right = 100 * first["pretraining_share_right"]
        return (
            f"{opening}{asked}: before it had seen a label, the model ranked {right:.0f} % of the labeled pairs right."
        )
    changes = []
    for key, words in _METRICS.items():
        before, after = (first[f"{key}_{kind}_pretraining"] for kind in ("without", "with"))
        changes.append(_from_to(words, before, after, after - before, first[f"pretraining_{key}_change_error"]))
    asked = ""
    if not first["is_pretrained"]:
        odds, needed = (math.exp(first[f"pretraining_{kind}"]) for kind in ("evidence", "least_evidence"))
        asked = f", since the labels say too little for it (odds of {odds:.1f} to 1, and {needed:.1f} to 1 are needed)"
    return f"{opening}{asked}: {', '.join(changes)}, on the labels, by models that have not seen them."


def _linear_model(first: dict[str, Any], last: dict[str, Any]) -> str | None:
    if last["round"] == 0 or not first.get("linear_model_has_learned"):
        return None
    numbers = " and ".join(f"{words} {_number(first[f'{key}_of_linear_model'])}" for key, words in _METRICS.items())
    return (
        f"A linear model on the hidden states helped to label the pool: {numbers} on the labels, each by a model that was fitted "
        "without it."
    )


def _next(kept: dict[str, Any], name: str | None, kept_round: int) -> str:
    if name is None:
        return "Next: pass `eval_dataset`, labeled pairs that are in no other dataset, to know what the pool adds."
    if kept_round == 0:
        return f"Next: label more pairs; {_MOST_USEFUL}."
    effects = {_direction(kept, name, "accuracy", 1), _direction(kept, name, "log_loss", -1)}
    if -1 in effects:
        return (
            "Next: go back to round 0 with `num_rounds=0`, or pass `calibration_dataset`, which keeps the best round; with hard "
            "labels, try `pseudo_label_type='soft'`."
        )
    if 1 in effects:
        return f"Next: a larger pool of the same kind, or more labels; {_MOST_USEFUL}."
    return f"Next: label more pairs ({_MOST_USEFUL}), or measure on more held-out pairs."


def _numbers(facts: dict[str, Any], name: str, between: str) -> str:
    return between.join(f"{words} {_number(_value(facts, name, metric))}" for metric, words in _METRICS.items())


def _value(facts: dict[str, Any], name: str, metric: str) -> float:
    """A metric with or without the temperature of the round, whichever is lower. The accuracy does not depend on it."""
    own = facts[f"{name}_{metric}"]
    return min(own, facts.get(f"{name}_calibrated_{metric}", own))


def _number(value: float) -> str:
    return f"{value:.3f}"
