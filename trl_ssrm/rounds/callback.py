import logging
from typing import Any, Protocol

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler

from ..data.pool import Pool
from ..scoring.pair_scores import PairScores
from .select import SelectionPolicy, above_threshold, candidates
from .settings import RoundSettings
from .teacher import teacher_scores


logger = logging.getLogger(__name__)


class RoundCallback(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] that is told of rounds too. [`SSRMTrainer`] fires these events beside those of
    transformers, which it fires in every round. Each gets the arguments, state and control of the trainer, `model`, and:

    - `on_round_begin`: `round`, and `num_train_pairs`, the number of pairs that it trains on.
    - `on_round_end`: `round`, `facts` about it, and `round_history`, the facts of all rounds so far.
    - `on_labeling_begin`: `round`, the round that has ended, `facts` about it, and `settings`, the
      [`~trl_ssrm.rounds.settings.RoundSettings`] of the run.
    - `on_labeling_end`: `round`, the round that will train on the pseudo-labels, and `facts` about them. If a callback
      sets `control.should_training_stop` here, the rounds end.
    """

    def on_round_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """A round begins to train."""

    def on_round_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """A round has been trained and measured."""

    def on_labeling_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """The pool is labeled now."""

    def on_labeling_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        """The pool has been labeled."""


class RoundCallbackHandler(CallbackHandler):
    """
    Callback handler that keeps the trackers open until the last round has ended.

    `Trainer` calls `on_train_end` at the end of every round. A tracker would close its run there, and log the next round
    to a new run.
    """

    def __init__(self, handler: CallbackHandler, report_to: str | list[str] | None):
        super().__init__(
            handler.callbacks, handler.model, handler.processing_class, handler.optimizer, handler.lr_scheduler
        )
        self.trackers = tuple(get_reporting_integration_callbacks(report_to))

    def tell(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **facts: Any
    ) -> TrainerControl:
        """
        Fire an event of a round.

        Args:
            event (`str`):
                Name of the event, one of the methods of [`RoundCallback`].
            args, state, control:
                As in every event of [`~transformers.TrainerCallback`].
            facts (`dict[str, Any]`):
                What the event tells besides.

        Returns:
            [`~transformers.TrainerControl`]: the control, which a callback may have changed.
        """
        for callback in self.callbacks:
            if isinstance(callback, RoundCallback):
                control = getattr(callback, event)(args, state, control, model=self.model, **facts) or control
        return control

    def on_train_end(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> TrainerControl:
        return self._end([c for c in self.callbacks if not isinstance(c, self.trackers)], args, state, control)

    def end_trackers(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> TrainerControl:
        """Close the trackers after the last round."""
        return self._end(self.open_trackers, args, state, control)

    @property
    def open_trackers(self) -> list[TrainerCallback]:
        """list of [`~transformers.TrainerCallback`]: the trackers, open until [`end_trackers`] is called."""
        return [callback for callback in self.callbacks if isinstance(callback, self.trackers)]

    def _end(self, callbacks: list[TrainerCallback], args, state, control) -> TrainerControl:
        everyone, self.callbacks = self.callbacks, callbacks
        try:
            return super().on_train_end(args, state, control)
        finally:
            self.callbacks = everyone


class Teacher(Protocol):
    """What the callback needs of a teacher, which [`SSRMRewardFunction`] and [`PairwiseJudge`] have."""

    kind: str
    model: Any
    processing_class: Any
    temperature: float

    @property
    def fingerprint(self) -> str:
        """`str`: hash of the model, which names its scores."""

    @property
    def max_length(self) -> int | None:
        """`int` or `None`: the longest sequence in tokens."""

    def tokenize_pair(self, prompt: Any, first: Any, second: Any) -> tuple[list[int], list[int]]:
        """`tuple[list[int], list[int]]`: token IDs of the two sequences whose scores tell which completion is preferred."""


class PseudoLabelingCallback(RoundCallback):
    """
    Decides how the unlabeled pool is scored and which of its pairs are kept.

    [`SSRMTrainer`] makes one by itself. Pass your own in `callbacks` to select pairs in another way, or subclass it and
    override [`PseudoLabelingCallback.score`] or [`PseudoLabelingCallback.select`].

    Args:
        selection_policy (`Callable[[PairScores], np.ndarray]`, *optional*):
            Function of the scores of the pool that returns a mask of shape `(num_pairs,)` of the pairs to keep. If
            `None`, the pairs whose confidence is greater than a threshold are kept. With a policy, the settings that
            choose the threshold have no effect.
        teacher ([`SSRMRewardFunction`] or [`PairwiseJudge`], *optional*):
            Finished model that labels the pool instead of the model that is trained, such as a larger one. With soft
            labels the model learns the probabilities of the teacher, at the temperature that was saved with it.

    Examples:
    ```python
    >>> import numpy as np
    >>> from trl_ssrm import PairScores, PseudoLabelingCallback


    >>> def top_tenth(scores: PairScores) -> np.ndarray:
    ...     return scores.confidence >= np.quantile(scores.confidence, 0.9)


    >>> callback = PseudoLabelingCallback(selection_policy=top_tenth)
    ```
    """

    def __init__(self, selection_policy: SelectionPolicy | None = None, teacher: Teacher | None = None):
        self.selection_policy = selection_policy
        self.teacher = teacher
        # Of the round that has ended; set by `on_labeling_begin`.
        self.settings: RoundSettings | None = None
        self.facts: dict[str, Any] = {}

    @property
    def labels_by_itself(self) -> bool:
        """`bool`: whether the model of the round labels the pool, and no teacher and no `score` of a subclass."""
        return self.teacher is None and not self.has_own_score

    @property
    def has_own_score(self) -> bool:
        """`bool`: whether a subclass scores the pool."""
        return type(self).score is not PseudoLabelingCallback.score

    @property
    def has_own_policy(self) -> bool:
        """`bool`: whether a function or a subclass selects the pairs, and no threshold."""
        return self.selection_policy is not None or type(self).select is not PseudoLabelingCallback.select

    def on_labeling_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        settings: RoundSettings | None = None,
        facts: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.settings, self.facts = settings, facts or {}

    def score(self, trainer: Any, pool: Pool, round: int) -> PairScores:
        """
        Score pairs of the pool with the current weights, or by the teacher.

        Args:
            trainer ([`SSRMTrainer`]):
                The trainer.
            pool ([`Pool`]):
                The pairs to score.
            round (`int`):
                The round that has ended.

        Returns:
            [`PairScores`]: the same in every process.
        """
        if self.teacher is None:
            return trainer.score_pool(pool, round)
        return teacher_scores(
            self.teacher, pool, trainer.accelerator, trainer.args, trainer.run.root / "teacher_scores"
        )

    def select(self, scores: PairScores) -> np.ndarray:
        """
        Choose the pairs to keep.

        Args:
            scores ([`PairScores`]):
                Scores of the pairs.

        Returns:
            `np.ndarray` of shape `(num_pairs,)`, bool: the kept pairs. Ties are left out afterwards in any case.
        """
        if self.selection_policy is not None:
            return self.selection_policy(scores)
        return above_threshold(scores, self.threshold(scores))

    def threshold(self, scores: PairScores) -> float:
        """
        Confidence that a pair has to exceed, as the settings choose it.

        Args:
            scores ([`PairScores`]):
                Scores of the pairs.

        Returns:
            `float`: the threshold, in `[0.5, 1]`. 1 keeps nothing.
        """
        settings = self.settings
        assert settings is not None
        if settings.confidence_threshold is not None:
            return settings.confidence_threshold
        return self.facts["precision_threshold"]

    def kept(self, scores: PairScores) -> np.ndarray:
        """
        The pairs to keep, without those that can have no pseudo-label.

        Args:
            scores ([`PairScores`]):
                Scores of the pairs.

        Returns:
            `np.ndarray` of shape `(num_pairs,)`, bool.

        Raises:
            ValueError: If the selection policy returns no mask.
        """
        mask = np.asarray(self.select(scores))
        if mask.shape != scores.logits.shape or mask.dtype != bool:
            raise ValueError(
                f"The selection policy returned an array of shape {mask.shape} and type {mask.dtype}; it has to be a "
                f"mask of type bool with one value for each of the {len(scores.logits)} pairs."
            )
        return mask & candidates(scores)
