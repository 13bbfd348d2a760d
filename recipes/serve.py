"""
Serve a reward model over HTTP, to trainers that ask for rewards by URL.

    pip install fastapi uvicorn
    python recipes/serve.py --reward_model_name_or_path reward-model --port 8000

`POST /rewards` with `{"prompts": [...], "completions": [...]}`, as text or as messages, gives `{"rewards": [...]}`: the
rewards of `SSRMRewardFunction`, or, for a pairwise model, those of `PairwiseJudge`. The columns `tools` and
`chat_template_kwargs` may be beside them.

`POST /get_reward` with `{"query": [...]}`, each query a prompt and its completion as one text, is what OpenRLHF sends to
`--reward.remote_url`. Where prompts are conversations, the query has the text of the chat template already: add
`--query_format chat`.

The guide `recipes/guides/serving.md` has the other servers that take a reward model.
"""

from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from trl import TrlParser

from trl_ssrm import Comparison, PairwiseJudge, SSRMRewardFunction


@dataclass
class ServeArguments:
    """Arguments of the script."""

    reward_model_name_or_path: str = field(metadata={"help": "Directory that `ssrm.py` saved."})
    reward_model_dtype: str = field(default="float32", metadata={"help": "Precision of the reward model."})
    query_format: str = field(
        default="text",
        metadata={
            "help": "What a query of `/get_reward` is: text, or text with the chat template applied.",
            "choices": ["text", "chat"],
        },
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; by default, of this machine alone."})
    port: int = field(default=8000, metadata={"help": "Port to listen at."})


class Completions(BaseModel):
    """Completions, each with its prompt."""

    prompts: list[Any]
    completions: list[Any]
    tools: list[Any] | None = None
    chat_template_kwargs: list[Any] | None = None


class Queries(BaseModel):
    """What OpenRLHF sends; its prompts and labels are not read."""

    query: list[str]


def end_of_completion(tokenizer: Any) -> str:
    """What the chat template writes behind a completion."""
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "completion"}]
    return tokenizer.apply_chat_template(messages, tokenize=False).rpartition("completion")[2]


def tokenize_query(reward: SSRMRewardFunction, query: str, query_format: str) -> list[int]:
    """Token IDs of a prompt with its completion, as in training."""
    if query_format == "text":
        return reward.tokenize("", query)
    # A policy stops at its end token, or at its length; behind it the template may write more.
    end = end_of_completion(reward.processing_class)
    for part in (end, end.rstrip()):
        query = query.removesuffix(part)
    return reward.processing_class(query + end, add_special_tokens=False)["input_ids"]


def make_app(model: str, dtype: str = "float32", query_format: str = "text") -> FastAPI:
    """The application of a reward model or a pairwise model."""
    is_pairwise = Comparison.from_pretrained(model) is not None
    function = PairwiseJudge(model, dtype=dtype) if is_pairwise else SSRMRewardFunction(model, dtype=dtype)
    app = FastAPI(title=f"Rewards of {function.__name__}")

    # `async`, so that one request is answered at a time: each takes the whole device.
    @app.post("/rewards")
    async def rewards(request: Completions) -> dict[str, list[float | None]]:
        return {"rewards": function(**request.model_dump())}

    @app.post("/get_reward")
    async def get_reward(request: Queries) -> dict[str, Any]:
        if isinstance(function, PairwiseJudge):
            raise ValueError("A pairwise model compares completions, and a query has one; use /rewards.")
        sequences = [tokenize_query(function, query, query_format) for query in request.query]
        scores = function.score_tokenized(sequences).tolist()
        return {"rewards": scores, "scores": scores, "extra_logs": {}}

    @app.exception_handler(ValueError)
    async def refuse(request: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=422)

    return app


def main(args: ServeArguments) -> None:
    app = make_app(args.reward_model_name_or_path, args.reward_model_dtype, args.query_format)
    uvicorn.run(app, host=args.host, port=args.port)


if __name__ == "__main__":
    parser = TrlParser(ServeArguments)
    main(*parser.parse_args_and_config())
