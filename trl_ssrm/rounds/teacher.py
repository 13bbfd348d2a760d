"""Another model as teacher: it labels the pool in place of the model that is trained."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from ..config import SSRMConfig
from ..data.build_pool import written_out
from ..data.pool import Pool
from ..data.sequences import PairedSequences
from ..scoring.layout import choose_layout
from ..scoring.pair_scores import PairScores
from ..scoring.preference import LOGITS_OF, orders_agree
from ..scoring.score import score_pairs


logger = logging.getLogger(__name__)


def teacher_scores(
    teacher: Any, pool: Pool, accelerator: Accelerator, args: SSRMConfig, directory: Path
) -> PairScores:
    """
    Score pairs of the pool by a teacher.

    Args:
        teacher ([`SSRMRewardFunction`] or [`PairwiseJudge`]):
            The teacher.
        pool ([`Pool`]):
            The pairs.
        accelerator ([`~accelerate.Accelerator`]):
            Whose processes share the work.
        args ([`SSRMConfig`]):
            `score_batch_tokens` and `disable_tqdm` are used.
        directory (`Path`):
            Where the tokenized sequences and the scores are kept. The teacher stays as it is from round to round, so
            its scores are computed once.

    Returns:
        [`PairScores`]: the scores at the temperature of the teacher, the same in every process. A pair that is longer than the teacher can
        read is a tie, which is never kept; such pairs are counted in the log.
    """
    pairs = _tokenized(teacher, pool, directory / "pairs")
    if getattr(teacher.model, "hf_device_map", None) is None:
        teacher.model.to(accelerator.device)
    scores = score_pairs(
        teacher.model,
        pairs,
        teacher.processing_class.pad_token_id,
        accelerator,
        choose_layout(teacher.model),
        args.score_batch_tokens,
        directory=directory,
        key=f"{teacher.fingerprint} {pairs.fingerprint}",
        name="unlabeled_dataset",
        rows=pool.rows,
        disable_tqdm=bool(args.disable_tqdm),
    )
    logits, longest = LOGITS_OF[teacher.kind](scores), teacher.max_length
    if longest is not None:
        is_too_long = np.maximum(pairs.lengths[pairs.first], pairs.lengths[pairs.second]) > longest
        if is_too_long.any():
            logger.warning(
                f"{is_too_long.sum()} pairs are longer than the {longest} tokens of the teacher; none is kept."
            )
        logits[is_too_long] = 0.0
    agree = orders_agree(scores) if teacher.kind == "pairwise" else None
    return PairScores(logits, temperature=teacher.temperature, orders_agree=agree)


def _tokenized(teacher: Any, pool: Pool, directory: Path) -> PairedSequences:
    def tokenize(texts: dict[str, Any]) -> dict[str, list[int]]:
        ids = teacher.tokenize_pair(texts["prompt"], texts["chosen"], texts["rejected"])
        return dict(zip(("chosen_ids", "rejected_ids"), ids, strict=True))

    texts = pool.iterate_texts(np.arange(len(pool)), np.ones(len(pool), dtype=bool))
    return PairedSequences.from_tokenized(
        written_out((tokenize(each) for batch in texts for each in batch), directory)
    )
