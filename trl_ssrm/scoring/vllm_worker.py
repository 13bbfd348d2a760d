"""
The process that vLLM scores in. [`~trl_ssrm.scoring.vllm_scoring.VLLMScorer`] starts it and talks to it by lines of JSON. It
imports nothing of the package, whose own imports take seconds.
"""

import json
import os
import signal
import sys
from typing import Any


def main() -> None:
    """Answer the line that says how to start the engine, then each line with sequences, until there are no more."""
    # Libraries print; only answers go to where the answers are read.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Ctrl-C reaches every process of a terminal; the one that asks says when this one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Otherwise the engine is one more process, which might outlive this one.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    engine = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if engine is None:
                engine, answer = _start(request), {}
            else:
                answer = _score(engine, request["sequences"])
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        print(json.dumps(answer), file=answers, flush=True)


def _start(settings: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(runner="pooling", **settings)


def _score(engine: Any, sequences: list[list[int]]) -> dict[str, Any]:
    from vllm import PoolingParams
    from vllm.inputs import TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in sequences]
    # Without the activation, which would make a probability of a reward.
    params = PoolingParams(use_activation=False)
    outputs = engine.encode(prompts, pooling_params=params, pooling_task="classify", use_tqdm=False)
    return {
        "scores": [output.outputs.data.item() for output in outputs],
        "cached_tokens": sum(output.num_cached_tokens for output in outputs),
    }


if __name__ == "__main__":
    main()
