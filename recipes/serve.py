"""
A reward model behind a URL, for OpenRLHF (`--reward.remote_url http://host:5000/get_reward`, before 0.11 `--remote_rm_url`) and for
anything that speaks JSON.

    pip install fastapi uvicorn
    python recipes/serve.py --model_name_or_path reward-model --port 5000

A request has `query`, whole texts that are scored as they are (what OpenRLHF sends, with the chat template of the policy in them),
or `prompts` and `completions`, as text or as messages, which are put together as in training. The answer has a reward for each.

    curl http://localhost:5000/get_reward -H "Content-Type: application/json" \\
        -d '{"prompts": ["Say hello."], "completions": ["Hello!"]}'

A reward function of TRL that asks it:

    def remote_reward(prompts, completions, **kwargs):
        body = {"prompts": prompts, "completions": completions}
        return requests.post("http://localhost:5000/get_reward", json=body, timeout=60).json()["rewards"]
"""

import threading
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from trl import TrlParser

from trl_ssrm import SSRMRewardFunction
from trl_ssrm.cli.errors import running_script


@dataclass
class ServeArguments:
    """Arguments of the server."""

    model_name_or_path: str = field(metadata={"help": "Scalar reward model: a directory or a model ID."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 is all of them."})
    port: int = field(default=5000, metadata={"help": "Port to listen on."})
    dtype: str = field(default="float32", metadata={"help": "Precision of the weights."})


def behind_end(tokenizer: Any) -> str:
    """What the chat template writes behind the end token of the last turn, such as a line break."""
    if tokenizer.chat_template is None or tokenizer.eos_token is None:
        return ""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    _, end, after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(tokenizer.eos_token)
    return after if end else ""


def rewards_of(function: SSRMRewardFunction, request: dict[str, Any]) -> list[float]:
    """Rewards of a request."""
    if texts := request.get("query"):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("`query` must be a list of texts.")
        tokenizer = function.processing_class
        end, after = tokenizer.eos_token, behind_end(tokenizer)
        # A generated text ends at the end token; the reward was trained behind what follows it.
        texts = [text + after if after and text.endswith(end) else text for text in texts]
        # The template of the policy has put all special tokens there.
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return function.score_tokenized(ids).tolist()
    prompts, completions = request.get("prompts"), request.get("completions")
    if not isinstance(prompts, list) or not isinstance(completions, list) or len(prompts) != len(completions):
        raise ValueError("Send `query`, or `prompts` and as many `completions`, as lists.")
    return function.score(prompts, completions).tolist()


def make_app(function: SSRMRewardFunction) -> FastAPI:
    """The application with its one endpoint."""
    app = FastAPI()

    # Requests are answered in threads, and scoring changes the model for a moment.
    one_at_a_time = threading.Lock()

    @app.post("/get_reward")
    def get_reward(request: dict[str, Any]) -> dict[str, list[float]]:
        try:
            with one_at_a_time:
                return {"rewards": rewards_of(function, request)}
        except (ValueError, TypeError) as error:
            raise HTTPException(400, str(error)) from error

    return app


def main(args: ServeArguments) -> None:
    uvicorn.run(
        make_app(SSRMRewardFunction(args.model_name_or_path, dtype=args.dtype)), host=args.host, port=args.port
    )


if __name__ == "__main__":
    parser = TrlParser(ServeArguments)
    with running_script():
        main(*parser.parse_args_and_config())
