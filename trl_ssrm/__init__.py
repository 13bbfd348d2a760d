"""Semi-supervised reward modeling for TRL: `RewardTrainer` plus an unlabeled pool."""

from typing import TYPE_CHECKING


__version__ = "0.1.0"

_HOME_OF = {
    "Comparison": "comparison",
    "ConfidenceFilteredDataCollator": "collator",
    "Evaluation": "evaluation",
    "NonFiniteScoreError": "scoring",
    "NonFiniteWeightError": "scoring",
    "PairScores": "selection",
    "PairwiseJudge": "judge",
    "PseudoLabelingCallback": "callback",
    "SSRMConfig": "config",
    "SSRMRewardFunction": "alignment",
    "SSRMTrainer": "trainer",
    "best_of_n": "labeling",
    "evaluate": "evaluation",
    "evaluation_table": "evaluation",
    "export_for_rewardbench": "benchmarks",
    "generate_completions": "generation",
    "label_preferences": "labeling",
    "load_labels": "annotation",
    "load_pairwise_model": "loading",
    "load_ppo_models": "alignment",
    "load_reward_model": "loading",
    "ssrm_reward": "alignment",
    "write_report": "report",
}

__all__ = [
    "Comparison",
    "ConfidenceFilteredDataCollator",
    "Evaluation",
    "NonFiniteScoreError",
    "NonFiniteWeightError",
    "PairScores",
    "PairwiseJudge",
    "PseudoLabelingCallback",
    "SSRMConfig",
    "SSRMRewardFunction",
    "SSRMTrainer",
    "best_of_n",
    "evaluate",
    "evaluation_table",
    "export_for_rewardbench",
    "generate_completions",
    "label_preferences",
    "load_labels",
    "load_pairwise_model",
    "load_ppo_models",
    "load_reward_model",
    "write_report",
]

if TYPE_CHECKING:
    from .alignment import SSRMRewardFunction as SSRMRewardFunction
    from .alignment import load_ppo_models as load_ppo_models
    from .annotation import load_labels as load_labels
    from .benchmarks import export_for_rewardbench as export_for_rewardbench
    from .callback import PseudoLabelingCallback as PseudoLabelingCallback
    from .collator import ConfidenceFilteredDataCollator as ConfidenceFilteredDataCollator
    from .comparison import Comparison as Comparison
    from .config import SSRMConfig as SSRMConfig
    from .evaluation import Evaluation as Evaluation
    from .evaluation import evaluate as evaluate
    from .evaluation import evaluation_table as evaluation_table
    from .generation import generate_completions as generate_completions
    from .judge import PairwiseJudge as PairwiseJudge
    from .labeling import best_of_n as best_of_n
    from .labeling import label_preferences as label_preferences
    from .loading import load_pairwise_model as load_pairwise_model
    from .loading import load_reward_model as load_reward_model
    from .report import write_report as write_report
    from .scoring import NonFiniteScoreError as NonFiniteScoreError
    from .scoring import NonFiniteWeightError as NonFiniteWeightError
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
