"""A saved model behind the ways of serving that the guide names."""

import json
import runpy
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import as_messages, preference_rows
from recipe_runs import RECIPES
from transformers import pipeline

from trl_ssrm import SSRMRewardFunction


ROWS = preference_rows(4, seed=1)


def test_pipeline_gives_the_reward_of_a_conversation(llama):
    rows = [as_messages(row) for row in ROWS]
    expected = SSRMRewardFunction(llama).score([row["prompt"] for row in rows], [row["chosen"] for row in rows])
    rewarder = pipeline("text-classification", model=llama, function_to_apply="none")
    texts = [rewarder.tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False) for row in rows]
    found = [rewarder(text, add_special_tokens=False)[0]["score"] for text in texts]
    assert found == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.fixture(scope="module")
def url(llama):
    """Address of `serve.py`, which listens on a free port."""
    pytest.importorskip("fastapi")
    uvicorn = pytest.importorskip("uvicorn")
    app = runpy.run_path(str(RECIPES / "serve.py"))["make_app"](SSRMRewardFunction(llama))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started and time.monotonic() < end:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/get_reward"
    server.should_exit = True
    thread.join()


def ask(url: str, **body) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.parametrize("is_conversational", [False, True])
def test_server_gives_the_rewards_of_prompts_and_completions(url, llama, is_conversational):
    rows = [as_messages(row) if is_conversational else row for row in ROWS]
    prompts, completions = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
    expected = SSRMRewardFunction(llama).score(prompts, completions).tolist()
    assert ask(url, prompts=prompts, completions=completions)["rewards"] == pytest.approx(expected, abs=1e-6)


def test_server_scores_whole_texts_as_openrlhf_sends_them(url, llama):
    rows = [as_messages(row) for row in ROWS]
    function = SSRMRewardFunction(llama)
    expected = function.score([row["prompt"] for row in rows], [row["chosen"] for row in rows]).tolist()
    template = function.processing_class.apply_chat_template
    texts = [template(row["prompt"] + row["chosen"], tokenize=False) for row in rows]
    found = ask(url, query=texts, prompts=[row["prompt"] for row in ROWS], labels=["", "", "", ""])
    assert found["rewards"] == pytest.approx(expected, abs=1e-6)


def test_text_that_ends_at_the_end_token_goes_on_as_in_training(llama):
    recipe = runpy.run_path(str(RECIPES / "serve.py"))
    function = SSRMRewardFunction(llama)
    tokenizer, end = function.processing_class, function.processing_class.eos_token
    for after, written in (("", ""), (" ", "{{ ' ' }}")):
        tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}" + end + written + "{% endfor %}"
        assert recipe["behind_end"](tokenizer) == after
        generated, trained, open_end = f"aa{end}", f"aa{end}{after}", "aa"
        one, other, cut = recipe["rewards_of"](function, {"query": [generated, trained, open_end]})
        assert one == other != cut
        # As training reads it.
        prompt, completion = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
        asked = recipe["rewards_of"](function, {"query": [f"a{end}{after}b{end}"]})
        assert asked == pytest.approx(function.score([prompt], [completion]).tolist(), abs=1e-6)
    tokenizer.chat_template = None
    assert recipe["behind_end"](tokenizer) == ""


def test_requests_at_the_same_time_get_their_own_rewards(url, llama):
    rows = [as_messages(row) for row in preference_rows(24, seed=8)]
    function = SSRMRewardFunction(llama)
    bodies = [{"prompts": [row["prompt"]] * 2, "completions": [row["chosen"], row["rejected"]]} for row in rows]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda body: ask(url, **body)["rewards"], bodies))
    for body, rewards in zip(bodies, found, strict=True):
        assert rewards == pytest.approx(function.score(body["prompts"], body["completions"]).tolist(), abs=1e-6)


@pytest.mark.parametrize("body", [{}, {"query": [1]}, {"prompts": ["a"], "completions": []}])
def test_server_says_what_to_send(url, body):
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(url, **body)
    assert error.value.code == 400 and "list" in json.load(error.value)["detail"]
