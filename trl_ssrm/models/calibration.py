"""The temperature that makes the probabilities of a reward model right, saved beside its weights."""

import json
import math
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ..io.files import write_json


FILE_NAME = "calibration.json"


def save_temperature(directory: str, temperature: float | None) -> None:
    """Write the temperature of a model to `calibration.json` in its directory; if it has none, delete that of a model before it."""
    path = Path(directory) / FILE_NAME
    if temperature is None:
        path.unlink(missing_ok=True)
    else:
        write_json(path, {"temperature": temperature})


def load_temperature(model: Any, revision: str | None = None) -> float:
    """
    Read the temperature that [`SSRMTrainer`] has saved with a model.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Directory or model ID; for a loaded model, the temperature is 1.
        revision (`str`, *optional*):
            Revision of a model on the hub.

    Returns:
        `float`: the temperature; 1 if none was saved.

    Raises:
        ValueError: If `calibration.json` holds no positive number.
    """
    if not isinstance(model, str):
        return 1.0
    path = cached_file(model, FILE_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return 1.0
    try:
        temperature = float(json.loads(Path(path).read_text(encoding="utf-8"))["temperature"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no temperature ({error!r}); correct it, or delete it to use 1.") from error
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"{path} has the temperature {temperature}, which must be positive; correct it, or delete it."
        )
    return temperature
