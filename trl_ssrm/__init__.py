"""Semi-supervised reward modeling for TRL: `RewardTrainer` plus an unlabeled pool."""

from typing import TYPE_CHECKING


__version__ = "0.1.0"

_HOME_OF = {
    "Comparison": "models.comparison",
    "ConfidenceFilteredDataCollator": "data.collator",
    "Evaluation": "evaluation.table",
    "NonFiniteScoreError": "scoring.score",
    "NonFiniteWeightError": "scoring.score",
    "PairScores": "scoring.pair_scores",
    "PairwiseJudge": "alignment.judge",
    "PseudoLabelingCallback": "rounds.callback",
    "RoundCallback": "rounds.callback",
    "SSRMConfig": "config",
    "SSRMRewardFunction": "alignment.reward_function",
    "SSRMTrainer": "trainer",
    "best_of_n": "alignment.labeling",
    "evaluate": "evaluation.evaluate",
    "evaluation_table": "evaluation.table",
    "export_for_rewardbench": "evaluation.exports",
    "generate_completions": "alignment.generation",
    "label_preferences": "alignment.labeling",
    "load_labels": "rounds.annotation",
    "load_pairwise_model": "models.loading",
    "load_ppo_models": "alignment.ppo",
    "load_reward_model": "models.loading",
    "ssrm_reward": "alignment.reward_function",
    "write_report": "reporting.report",
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
    "RoundCallback",
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
    from .alignment.generation import generate_completions as generate_completions
    from .alignment.judge import PairwiseJudge as PairwiseJudge
    from .alignment.labeling import best_of_n as best_of_n
    from .alignment.labeling import label_preferences as label_preferences
    from .alignment.ppo import load_ppo_models as load_ppo_models
    from .alignment.reward_function import SSRMRewardFunction as SSRMRewardFunction
    from .config import SSRMConfig as SSRMConfig
    from .data.collator import ConfidenceFilteredDataCollator as ConfidenceFilteredDataCollator
    from .evaluation.evaluate import evaluate as evaluate
    from .evaluation.exports import export_for_rewardbench as export_for_rewardbench
    from .evaluation.table import Evaluation as Evaluation
    from .evaluation.table import evaluation_table as evaluation_table
    from .models.comparison import Comparison as Comparison
    from .models.loading import load_pairwise_model as load_pairwise_model
    from .models.loading import load_reward_model as load_reward_model
    from .reporting.report import write_report as write_report
    from .rounds.annotation import load_labels as load_labels
    from .rounds.callback import PseudoLabelingCallback as PseudoLabelingCallback
    from .rounds.callback import RoundCallback as RoundCallback
    from .scoring.pair_scores import PairScores as PairScores
    from .scoring.score import NonFiniteScoreError as NonFiniteScoreError
    from .scoring.score import NonFiniteWeightError as NonFiniteWeightError
    from .trainer import SSRMTrainer as SSRMTrainer


def __getattr__(name: str):
    # TRL takes seconds to import, so nothing of it is touched before a name is asked for.
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
