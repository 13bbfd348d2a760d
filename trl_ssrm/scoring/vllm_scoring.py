"""vLLM in the place of the model where the pool is scored."""

import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from accelerate.utils.memory import clear_device_cache
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.modeling_layers import GenericForSequenceClassification

from ..config import SSRMConfig
from ..io.files import telling_where
from ..models.adapters import merged
from ..models.classifier import classifier_of
from . import vllm_worker
from .batches import BatchBudget, Scorer


logger = logging.getLogger(__name__)

# Start of the names of directories that weights lie in while an engine loads them.
DIRECTORY_PREFIX = "vllm-"
# How far the rewards of vLLM may be from those of the model, relative to their size, on a few sequences. That finds
# another model, not another rounding: attention kernels of GPUs multiply float32 in a lower precision too.
TOLERANCE = {"float32": 1e-2, "float16": 5e-2, "bfloat16": 1e-1}
NUM_CHECKED = 4
SECONDS_TO_END = 60
_DTYPE_OF = {"bf16": "bfloat16", "fp16": "float16"}


def check_vllm(args: SSRMConfig, is_quantized: bool) -> None:
    """
    Refuse to score with vLLM where it is not there, or where it would score with something else than the model.

    Args:
        args ([`SSRMConfig`]):
            The training arguments.
        is_quantized (`bool`):
            Whether the base of an adapter is quantized.

    Raises:
        ImportError: If vLLM is not installed.
        ValueError: If there are several processes, or the base is quantized.
    """
    if args.world_size > 1:
        raise ValueError(
            "`use_vllm` scores the pool in one engine beside one process; launch the script with plain `python`, or leave "
            "`use_vllm` out."
        )
    if is_quantized:
        raise ValueError(
            "`use_vllm` would score with the base as it was before it was quantized; load it without "
            "`quantization_config`, or leave `use_vllm` out."
        )
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "`use_vllm` needs vLLM, which is not installed; install it (`pip install vllm`), or leave `use_vllm` out."
        )


class VLLMScorer:
    """
    Scores sequences by vLLM with the weights that a model has when it is entered. To be used in a `with` statement.

    The engine is in a process of its own: when that ends, its memory is free, and what vLLM changes in a process, such as
    random states and numbers of threads, does not reach the training.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Sequence classifier with one label, whole in this process, or an adapter for one, which is merged.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. vLLM wants one, but gets token IDs.
        accelerator ([`~accelerate.Accelerator`]):
            vLLM computes in its mixed precision or, without one, in that of the model; the last layer in float32.
        directory (`Path`):
            Where the weights are written for vLLM to load, and deleted once it has.
        longest (`int`):
            Number of tokens of the longest sequence.
        gpu_memory_utilization (`float`):
            Share of the memory of the GPU, on a CPU of the memory, that vLLM may take.

    Attributes:
        cached_tokens (`int`):
            Number of tokens so far that vLLM did not have to compute, since other sequences start with them.
    """

    # The same as the names of layouts: it is in the key of stored scores, and sequences with the same prompt, which vLLM
    # computes once, follow one another.
    layout = "vllm"

    def __init__(
        self,
        model: Any,
        processing_class: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        directory: Path,
        longest: int,
        gpu_memory_utilization: float,
    ):
        self.model = model
        self.processing_class = processing_class
        self.accelerator = accelerator
        self.directory = directory
        self.longest = longest
        self.gpu_memory_utilization = gpu_memory_utilization
        self.cached_tokens = 0
        self.is_checked = False
        budget = BatchBudget(None, accelerator.device)
        self.model_itself = Scorer(model, processing_class.pad_token_id, accelerator, budget, "padded")
        precision = _DTYPE_OF.get(accelerator.mixed_precision)
        self.dtype = precision or str(next(classifier_of(model).parameters()).dtype).removeprefix("torch.")

    def __enter__(self) -> "VLLMScorer":
        clear_device_cache(garbage_collection=True)
        # By its path, since what starts here may find the package elsewhere or nowhere; and not with the directory of the
        # package before those of other packages.
        self.process = subprocess.Popen(
            [sys.executable, "-P", vllm_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        try:
            self._load()
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, error_type: type[BaseException] | None = None, *error: Any) -> None:
        if error_type is not None:
            # It might be at work for a while.
            self.process.kill()
        try:
            # The end of its input ends it.
            self.process.communicate(timeout=SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()

    def score(self, sequences: Sequence[np.ndarray], progress: tqdm | None = None) -> np.ndarray:
        """
        Score sequences.

        Args:
            sequences (`Sequence[np.ndarray]`):
                Token IDs of each, int64.
            progress ([`~tqdm.tqdm`], *optional*):
                Told of the tokens that are done.

        Returns:
            `np.ndarray` of shape `(num_sequences,)`, float32: the scores.

        Raises:
            RuntimeError: If vLLM fails.
            ValueError: If the first few rewards are not those of the model.
        """
        answer = self._ask({"sequences": [self._read_part(ids).tolist() for ids in sequences]})
        self.cached_tokens += answer["cached_tokens"]
        scores = np.array(answer["scores"], dtype=np.float32)
        failed = np.flatnonzero(~np.isfinite(scores)).tolist()
        if failed:
            # One that is not finite stays in memory that is used again, and spoils those behind it.
            scores[failed] = self.model_itself.score([sequences[position] for position in failed])
        if not self.is_checked and len(sequences):
            self._check(sequences[:NUM_CHECKED], scores[:NUM_CHECKED])
        if progress is not None:
            progress.update(sum(map(len, sequences)))
        return scores

    def _load(self) -> None:
        """Have vLLM load the weights that the model has now."""
        self.directory.mkdir(parents=True, exist_ok=True)
        # Some file systems keep what a process has open under another name for a while.
        with tempfile.TemporaryDirectory(
            prefix=DIRECTORY_PREFIX, dir=self.directory, ignore_cleanup_errors=True
        ) as directory:
            with telling_where(Path(directory)):
                model = merged(self.model) if is_peft_model(self.model) else self.model
                model.save_pretrained(directory)
                self.processing_class.save_pretrained(directory)
                del model
            clear_device_cache(garbage_collection=True)
            self._ask(
                {
                    "model": directory,
                    "dtype": self.dtype,
                    "max_model_len": self.longest,
                    "gpu_memory_utilization": self.gpu_memory_utilization,
                    # Compiling takes longer than it saves in an engine that lives as long as these weights.
                    "enforce_eager": True,
                    "use_tqdm_on_load": False,
                }
            )

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"vLLM ended with exit code {self.process.wait()}; what it said is above.")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(
                f"vLLM can't score with this model ({answer['error']}); see what it says above, set "
                "`vllm_gpu_memory_utilization`, or leave `use_vllm` out."
            )
        return answer

    def _read_part(self, ids: np.ndarray) -> np.ndarray:
        """
        What a model reads of a sequence. A decoder gives its score behind the last token that is no padding token, in
        transformers, where it may be that of the end too; in vLLM, behind the last one.
        """
        if not isinstance(classifier_of(self.model), GenericForSequenceClassification):
            return ids
        is_token = ids != classifier_of(self.model).config.get_text_config().pad_token_id
        return ids[: int((np.arange(len(ids)) * is_token).argmax()) + 1]

    def _check(self, sequences: Sequence[np.ndarray], scores: np.ndarray) -> None:
        """Compare a few scores with those of the model itself."""
        expected = self.model_itself.score(sequences)
        self.is_checked = True
        difference, size = np.abs(scores - expected).max(), np.abs(expected).max()
        # Nothing can be told from NaN, and who scores with such a model finds out soon.
        if np.isfinite(expected).all() and not difference <= TOLERANCE[self.dtype] * size:
            raise ValueError(
                f"vLLM gives other rewards than the model, {scores.tolist()} and not {expected.tolist()}, so it does not "
                f"run {type(classifier_of(self.model)).__name__} as transformers does; leave `use_vllm` out."
            )
        logger.info(f"Rewards of vLLM and of the model differ by {difference:.1e} at most, of {size:.1e}.")
