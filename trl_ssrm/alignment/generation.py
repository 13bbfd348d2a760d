"""Completions of a policy, to be labeled by the reward model."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, Value
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.checks import check_prompts
from ..data.formats import TEMPLATE_COLUMNS
from ..data.markup import as_literal, special_tokens_of
from ..io.hub import check_model_is_there
from ..io.storage import content_hash, tensors_hash
from ..models.loading import load_policy
from ..models.tokenizers import check_padding
from .shards import Row, map_in_shards


# What is lost when generation is interrupted.
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

    Started again after an interruption, it goes on where it was, to the same result. Launched with several processes,
    they share the work.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Policy: a directory or model ID, or a causal language model.
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt`, as text or conversations; `tools` and `chat_template_kwargs` as in TRL.
        output_dir (`str`):
            Directory for the completions, the same for all processes.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the policy. If `None`, it is loaded from where the policy comes from.
        num_completions (`int`, *optional*, defaults to `2`):
            Completions of each prompt.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest completion in tokens. A completion that reaches it is kept as it is.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of sampling; 0 is greedy, and needs `num_completions=1`.
        top_p (`float`, *optional*, defaults to `1.0`):
            Probability mass of the tokens to sample from. In `(0, 1]`.
        batch_size (`int`, *optional*, defaults to `8`):
            Prompts in a batch, each with all of its completions.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Whether to generate with vLLM, which has to be installed. It needs the model as a `str`.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"float32"`):
            Precision to load the policy in.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Further arguments to load the policy with, such as `revision` and `quantization_config`; with vLLM, further
            arguments of its `LLM`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with the checkpoint.
        seed (`int`, *optional*, defaults to `42`):
            Seed of sampling.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to leave out the progress bar.

    Returns:
        [`~datasets.Dataset`]: memory-mapped, one row a prompt, with `prompt`, `completions`, and `tools` and
        `chat_template_kwargs` where the input has them. Completions without text are left out and counted in the log.

    Raises:
        ValueError: If the data or the settings can't be used, or if `output_dir` holds other completions.
    """
    for name, is_valid, words in (
        ("num_completions", num_completions > 0, "positive"),
        ("max_new_tokens", max_new_tokens > 0, "positive"),
        ("batch_size", batch_size > 0, "positive"),
        ("temperature", 0 <= temperature < math.inf, "at least 0 and finite"),
        ("top_p", 0 < top_p <= 1, "in (0, 1]"),
    ):
        if not is_valid:
            raise ValueError(f"`{name}` must be {words}.")
    if temperature == 0 and num_completions > 1:
        raise ValueError(
            "With `temperature=0` all completions of a prompt are the same; set `num_completions=1` or raise it."
        )
    if use_vllm and not isinstance(model, str):
        raise ValueError("`use_vllm` needs the policy as a directory or model ID, which vLLM loads itself.")
    if use_vllm and PartialState().num_processes > 1:
        raise ValueError("vLLM starts its own processes; with `use_vllm`, launch the script with plain `python`.")
    check_prompts(dataset, "dataset")
    is_conversational = isinstance(dataset[0]["prompt"], list)
    kwargs = model_init_kwargs or {}
    check_model_is_there(model, **kwargs)
    if processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(
            model if isinstance(model, str) else model.config.name_or_path,
            revision=kwargs.get("revision"),
            trust_remote_code=trust_remote_code,
        )
    if is_conversational and processing_class.chat_template is None:
        raise ValueError(
            "The prompts are conversations, but the tokenizer of the policy has no chat template; set one, or give the "
            "prompts as text."
        )
    check_padding(processing_class)
    policy: Any = model
    if isinstance(model, str) and not use_vllm:
        policy = load_policy(model, dtype, trust_remote_code, **kwargs)
    if use_vllm:
        sample = _vllm_sampler(policy, dtype, trust_remote_code, kwargs)
    else:
        sample = _transformers_sampler(policy, processing_class)
    sampling = {
        "num_completions": num_completions,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
    }

    def generate(rows: list[Row], first_row: int) -> tuple[list[Row], Counter[str]]:
        dropped: Counter[str] = Counter()
        made = []
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            prompts = [_rendered(row, processing_class) if is_conversational else row["prompt"] for row in batch]
            # Drawn from the seed and the row alone, so that it does not matter who generates it, and when.
            texts = sample(prompts, is_conversational, seed + first_row + start, **sampling)
            for row, completions in zip(batch, texts, strict=True):
                kept = [text for text in completions if text.strip()]
                dropped["completions without text"] += len(completions) - len(kept)
                made.append(
                    {
                        "prompt": row["prompt"],
                        "completions": [[{"role": "assistant", "content": text}] for text in kept]
                        if is_conversational
                        else kept,
                        **{name: row[name] for name in TEMPLATE_COLUMNS if name in row},
                    }
                )
        return made, dropped

    feature: Any = [{"role": Value("string"), "content": Value("string")}] if is_conversational else Value("string")
    return map_in_shards(
        dataset.select_columns([name for name in ("prompt", *TEMPLATE_COLUMNS) if name in dataset.column_names]),
        generate,
        {"completions": [feature]},
        output_dir,
        {
            "model": _files(policy) if use_vllm else tensors_hash(dict(policy.named_parameters())),
            "dtype": str(dtype),
            "chat_template": content_hash(processing_class.chat_template) if is_conversational else None,
            **sampling,
            # They decide which numbers a row draws.
            "batch_size": batch_size,
            "use_vllm": use_vllm,
            "seed": seed,
        },
        shard_rows=SHARD_BATCHES * batch_size,
        desc="Generating",
        disable_tqdm=disable_tqdm,
    )


def _rendered(row: Row, tokenizer: Any) -> str:
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    prompt, tools = as_literal([row["prompt"], tools], special_tokens_of(tokenizer))
    return tokenizer.apply_chat_template(
        prompt,
        tools=tools,
        tokenize=False,
        add_generation_prompt=True,
        **(row.get("chat_template_kwargs") or {}),
    )


def _transformers_sampler(model: Any, tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[list[str]]]:
    """Samples completions of a batch of prompts in this process."""
    if getattr(model, "hf_device_map", None) is None:
        model = model.to(PartialState().device)
    model.eval()
    # A model may declare further ones, such as that of the end of a turn.
    declared = model.generation_config.eos_token_id
    end_tokens = sorted({*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id} - {None})

    def sample(prompts, is_rendered, seed, num_completions, max_new_tokens, temperature, top_p) -> list[list[str]]:
        # A decoder goes on at the end of the prompt.
        settings = {"padding": True, "padding_side": "left", "add_special_tokens": not is_rendered}
        inputs = tokenizer(prompts, return_tensors="pt", **settings).to(model.device)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            num_return_sequences=num_completions,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=end_tokens or None,
            bos_token_id=model.generation_config.bos_token_id,
            **(
                {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
                if temperature > 0
                else {"do_sample": False}
            ),
        )
        devices = [model.device] if model.device.type == "cuda" else []
        # `generate` would fill in what the model declares, such as a repetition penalty.
        own, model.generation_config = model.generation_config, config
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                generation_config=config,
                # The model is whole, and another process may have nothing left to generate.
                synced_gpus=False,
            )
        model.generation_config = own
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [texts[start : start + num_completions] for start in range(0, len(texts), num_completions)]

    return sample


def _files(name_or_path: str) -> list:
    """What tells a checkpoint that vLLM loads from another at the same place."""
    files = sorted(Path(name_or_path).glob("*.safetensors"))
    return [name_or_path, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


def _vllm_sampler(
    name_or_path: str, dtype: str | torch.dtype, trust_remote_code: bool, kwargs: dict[str, Any]
) -> Callable[..., list[list[str]]]:
    """Samples completions of a batch of prompts with vLLM."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=name_or_path, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
    tokenizer = llm.get_tokenizer()

    def sample(prompts, is_rendered, seed, num_completions, max_new_tokens, temperature, top_p) -> list[list[str]]:
        ids = tokenizer(prompts, add_special_tokens=not is_rendered)["input_ids"]
        params = SamplingParams(
            n=num_completions, max_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
        )
        outputs = llm.generate([{"prompt_token_ids": each} for each in ids], params, use_tqdm=False)
        return [[completion.text for completion in output.outputs] for output in outputs]

    return sample
