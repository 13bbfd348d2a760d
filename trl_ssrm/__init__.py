"""Semi-supervised reward modeling for TRL: `RewardTrainer` plus an unlabeled pool."""

from typing import TYPE_CHECKING


__version__ = "0.1.0"

_HOME_OF = {
    "ConfidenceFilteredDataCollator": "collator",
    "NonFiniteScoreError": "scoring",
    "PairScores": "selection",
    "PseudoLabelingCallback": "callback",
    "SSRMConfig": "config",
    "SSRMTrainer": "trainer",
}

__all__ = [
    "ConfidenceFilteredDataCollator",
    "NonFiniteScoreError",
    "PairScores",
    "PseudoLabelingCallback",
    "SSRMConfig",
    "SSRMTrainer",
]

if TYPE_CHECKING:
    from .callback import PseudoLabelingCallback as PseudoLabelingCallback
    from .collator import ConfidenceFilteredDataCollator as ConfidenceFilteredDataCollator
    from .config import SSRMConfig as SSRMConfig
    from .scoring import NonFiniteScoreError as NonFiniteScoreError
    from .selection import PairScores as PairScores
    from .trainer import SSRMTrainer as SSRMTrainer


def __getattr__(name: str):
    # TRL takes seconds to import, so nothing of it is touched before a name is asked for.
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
