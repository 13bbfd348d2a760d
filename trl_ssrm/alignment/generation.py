"""Completions that a policy generates, for the reward model to label."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, Value
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.checks import check_prompts, tokenizing, unformatted
from ..data.conversations import ConversationReader
from ..data.formats import TEMPLATE_COLUMNS
from ..io.hub import check_model_is_there
from ..io.storage import content_hash, tensors_hash
from ..models.loading import load_policy
from ..models.tokenizers import check_padding
from .shards import Row, map_in_shards


# Batches that a process generates before it writes them. After an interruption, it generates at most so many again.
SHARD_BATCHES = 4


def generate_completions(
    model: str | PreTrainedModel,
    dataset: Dataset,
    output_dir: str,
    processing_class: PreTrainedTokenizerBase | None = None,
    num_completions: int = 2,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 8,
    use_vllm: bool = False,
    dtype: str | torch.dtype = "float32",
    model_init_kwargs: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    seed: int = 42,
    disable_tqdm: bool = False,
) -> Dataset:
    """
    Sample completions of prompts from a policy, for [`label_preferences`] or [`best_of_n`].

    After an interruption, the same call continues with the missing shards, to the same result. Several processes share
    the work.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Policy: a directory or model ID, or a causal language model.
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt`, as text or conversations; `tools` and `chat_template_kwargs` as in TRL.
        output_dir (`str`):
            Directory for the completions, the same for all processes.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the policy. If `None`, it is loaded from the directory or ID of the policy.
        num_completions (`int`, *optional*, defaults to `2`):
            Completions of each prompt.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest completion in tokens. A completion that reaches this length is kept as it is.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of sampling. `0` is greedy decoding and needs `num_completions=1`.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass of the tokens to sample from. In `(0, 1]`.
        batch_size (`int`, *optional*, defaults to `8`):
            Prompts in a batch, each with all of its completions.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether to generate with vLLM, which has to be installed. `model` must then be a `str`.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`):
            Precision to load the policy in.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Further arguments to load the policy with, such as `revision` and `quantization_config`. With `use_vllm`,
            further arguments of vLLM's `LLM`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the checkpoint.
        seed (`int`, *optional*, defaults to `42`):
            Seed of sampling.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to hide the progress bar.

    Returns:
        [`~datasets.Dataset`]: memory-mapped, one row a prompt, with `prompt`, `completions`, and `tools` and
        `chat_template_kwargs` if the input has them. Completions without text are dropped; their number is logged.

    Raises:
        ValueError: If a row or a setting can't be used, or if `output_dir` holds the result of another job.
    """
    sampling = _Sampling(num_completions, max_new_tokens, temperature, top_p)
    _check_arguments(sampling, batch_size, model, use_vllm)
    dataset = _checked(dataset)
    is_conversational = isinstance(dataset[0]["prompt"], list)
    kwargs = model_init_kwargs or {}
    check_model_is_there(model, **kwargs)
    tokenizer = processing_class or _load_tokenizer(model, trust_remote_code, kwargs)
    _check_tokenizer(tokenizer, is_conversational)
    reader = ConversationReader(tokenizer) if is_conversational else None
    sample, weights = _load_sampler(model, tokenizer, use_vllm, dtype, trust_remote_code, kwargs)

    def generate(rows: list[Row], first_row: int) -> tuple[list[Row], Counter[str]]:
        dropped: Counter[str] = Counter()
        made = []
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            prompts = [_render(row, reader, number) for number, row in enumerate(batch, first_row + start)]
            # The seed depends on the row alone: the result is the same whichever process generates it, and whenever.
            texts = sample(prompts, is_conversational, seed + first_row + start, sampling)
            for row, own in zip(batch, texts, strict=True):
                made.append(_with_completions(row, own, is_conversational))
                dropped["completions without text"] += len(own) - len(made[-1]["completions"])
        return made, dropped

    feature: Any = [{"role": Value("string"), "content": Value("string")}] if is_conversational else Value("string")
    return map_in_shards(
        dataset.select_columns([name for name in ("prompt", *TEMPLATE_COLUMNS) if name in dataset.column_names]),
        generate,
        {"completions": [feature]},
        output_dir,
        {
            "model": weights,
            "dtype": str(dtype),
            "chat_template": content_hash(tokenizer.chat_template) if is_conversational else None,
            **asdict(sampling),
            "batch_size": batch_size,  # decides which random numbers a row gets
            "use_vllm": use_vllm,
            "seed": seed,
        },
        shard_rows=SHARD_BATCHES * batch_size,
        desc="Generating",
        disable_tqdm=disable_tqdm,
    )


@dataclass(frozen=True)
class _Sampling:
    num_completions: int
    max_new_tokens: int
    temperature: float
    top_p: float


# Takes prompts, whether a chat template has rendered them, a seed, and settings;
# returns the completions of each prompt.
Sampler = Callable[[list[str], bool, int, _Sampling], list[list[str]]]


def _check_arguments(sampling: _Sampling, batch_size: int, model: str | PreTrainedModel, use_vllm: bool) -> None:
    for name, is_valid, words in (
        ("num_completions", sampling.num_completions > 0, "positive"),
        ("max_new_tokens", sampling.max_new_tokens > 0, "positive"),
        ("batch_size", batch_size > 0, "positive"),
        ("temperature", 0 <= sampling.temperature < math.inf, "at least 0 and finite"),
        ("top_p", 0 < sampling.top_p <= 1, "in (0, 1]"),
    ):
        if not is_valid:
            raise ValueError(f"`{name}` must be {words}.")
    if sampling.temperature == 0 and sampling.num_completions > 1:
        raise ValueError(
            "With `temperature=0` all completions of a prompt are the same; set `num_completions=1`, or raise "
            "`temperature`."
        )
    if use_vllm and not isinstance(model, str):
        raise ValueError("vLLM can't take a policy that is loaded; with `use_vllm`, give its directory or model ID.")
    if use_vllm and PartialState().num_processes > 1:
        raise ValueError("vLLM starts its own processes; with `use_vllm`, launch the script with plain `python`.")


def _load_tokenizer(
    model: str | PreTrainedModel, trust_remote_code: bool, kwargs: dict[str, Any]
) -> PreTrainedTokenizerBase:
    name_or_path = model if isinstance(model, str) else model.config.name_or_path
    return AutoTokenizer.from_pretrained(
        name_or_path, revision=kwargs.get("revision"), trust_remote_code=trust_remote_code
    )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, is_conversational: bool) -> None:
    if is_conversational and tokenizer.chat_template is None:
        raise ValueError(
            "The prompts are conversations, but the tokenizer of the policy has no chat template; set one, or give "
            "the prompts as text."
        )
    check_padding(tokenizer)


def _checked(dataset: Dataset) -> Dataset:
    check_prompts(dataset, "dataset")
    return unformatted(dataset)


def _render(row: Row, reader: ConversationReader | None, number: int) -> str:
    """The prompt of a row as the policy reads it. Without a reader it is text."""
    if reader is None:
        return row["prompt"]
    with tokenizing(f"Row {number} of `dataset`"):
        prompt, arguments = reader.read(row["prompt"], row.get("tools"), row.get("chat_template_kwargs"))
        # A prompt whose row does not ask for the start of an answer is given it here.
        arguments = {"add_generation_prompt": True, **arguments}
        return reader.tokenizer.apply_chat_template(prompt, tokenize=False, **arguments)


def _with_completions(row: Row, texts: list[str], is_conversational: bool) -> Row:
    """The row with those completions that have text."""
    kept: list = [text for text in texts if text.strip()]
    if is_conversational:
        kept = [[{"role": "assistant", "content": text}] for text in kept]
    template = {name: row[name] for name in TEMPLATE_COLUMNS if name in row}
    return {"prompt": row["prompt"], "completions": kept, **template}


def _load_sampler(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    use_vllm: bool,
    dtype: str | torch.dtype,
    trust_remote_code: bool,
    kwargs: dict[str, Any],
) -> tuple[Sampler, Any]:
    """A sampler, and JSON values that tell its weights from others."""
    if use_vllm and isinstance(model, str):
        return _vllm_sampler(model, dtype, trust_remote_code, kwargs), _files(model)
    policy = load_policy(model, dtype, trust_remote_code, **kwargs) if isinstance(model, str) else model
    return _transformers_sampler(policy, tokenizer), tensors_hash(dict(policy.named_parameters()))


def _transformers_sampler(model: Any, tokenizer: PreTrainedTokenizerBase) -> Sampler:
    """Samples with transformers in this process."""
    if getattr(model, "hf_device_map", None) is None:
        model = model.to(PartialState().device)
    model.eval()
    # A model may declare more end tokens than its tokenizer, such as the end of a turn.
    declared = model.generation_config.eos_token_id
    end_tokens = sorted({*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id} - {None})

    def sample(prompts: list[str], is_rendered: bool, seed: int, sampling: _Sampling) -> list[list[str]]:
        # Padded on the left, since generation continues at the right end.
        settings = {"padding": True, "padding_side": "left", "add_special_tokens": not is_rendered}
        inputs = tokenizer(prompts, return_tensors="pt", **settings).to(model.device)
        greedy = {"do_sample": False}
        random = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            num_return_sequences=sampling.num_completions,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=end_tokens or None,
            bos_token_id=model.generation_config.bos_token_id,
            **(random if sampling.temperature > 0 else greedy),
        )
        devices = [model.device] if model.device.type == "cuda" else []
        # `generate` would add settings that the model declares, such as a repetition penalty.
        own, model.generation_config = model.generation_config, config
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=config,
                # Each process has the whole model, and another process may already be done.
                synced_gpus=False,
            )
        model.generation_config = own
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        number = sampling.num_completions
        return [texts[start : start + number] for start in range(0, len(texts), number)]

    return sample


def _vllm_sampler(name_or_path: str, dtype: str | torch.dtype, trust_remote_code: bool, kwargs: dict) -> Sampler:
    """Samples with vLLM."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=name_or_path, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
    tokenizer = llm.get_tokenizer()

    def sample(prompts: list[str], is_rendered: bool, seed: int, sampling: _Sampling) -> list[list[str]]:
        ids = tokenizer(prompts, add_special_tokens=not is_rendered)["input_ids"]
        params = SamplingParams(
            n=sampling.num_completions,
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
        )
        outputs = llm.generate([{"prompt_token_ids": each} for each in ids], params, use_tqdm=False)
        return [[completion.text for completion in output.outputs] for output in outputs]

    return sample


def _files(name_or_path: str) -> list:
    """Facts that change if other weights are saved in the directory. vLLM loads the weights, so we can't hash them."""
    files = sorted(Path(name_or_path).glob("*.safetensors"))
    return [name_or_path, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]
