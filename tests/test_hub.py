"""Models that are not there: one sentence, at once."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import preference_rows
from datasets import Dataset

from trl_ssrm import (
    PairwiseJudge,
    SSRMRewardFunction,
    SSRMTrainer,
    evaluate,
    generate_completions,
    load_ppo_models,
    load_reward_model,
)
from trl_ssrm.cli.main import main
from trl_ssrm.io.hub import check_model_is_there
from trl_ssrm.models.loading import load_policy


@pytest.mark.parametrize("name", ["./none", "/none/such", "a/b/c", "~/none", "runs/my model", "runs/"])
def test_path_without_a_folder_is_refused(name):
    with pytest.raises(ValueError, match=rf"^There is no folder {re.escape(name)}; check the path.$"):
        check_model_is_there(name)


def test_file_is_no_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="model.safetensors is a file; give the folder that it is in"):
        check_model_is_there(str(tmp_path / "model.safetensors"))


def test_model_that_was_kept_needs_no_hub(tmp_path):
    # As the client of the hub keeps models.
    kept = tmp_path / "models--org--kept"
    (kept / "snapshots" / "0123").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0123")
    (kept / "snapshots" / "0123" / "config.json").write_text("{}")
    check_model_is_there("org/kept", cache_dir=tmp_path)
    for name, revision in (("org/other", None), ("org/kept", "other")):
        with pytest.raises(ValueError, match=f"^{name} is no folder here, and the hub can't be reached"):
            check_model_is_there(name, revision=revision, cache_dir=tmp_path)


def ask(endpoint: str) -> tuple[str, float]:
    """What is said of a model that is not here, and how long it took, in a process that may ask a hub."""
    code = (
        "import time, trl_ssrm.io.hub\nstart = time.monotonic()\n"
        "try:\n    trl_ssrm.io.hub.check_model_is_there('runs/none')\n    said = 'nothing'\n"
        "except ValueError as error:\n    said = str(error)\n"
        "print(said, time.monotonic() - start, sep='\\n')"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "no_proxy": "localhost"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    said, seconds = done.stdout.splitlines()
    return said, float(seconds)


def test_hub_that_can_not_be_reached_is_asked_once():
    # Nobody listens there. Asked as for a file, it would be asked again for half a minute.
    said, seconds = ask("http://localhost:1")
    assert said.startswith("runs/none is no folder here, and the hub can't be reached (")
    assert said.endswith("); check the path, or the connection.") and seconds < 10


def test_what_the_hub_answers_is_told_by_who_loads_the_model():
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("localhost", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said, _ = ask(f"http://localhost:{server.server_port}")
        server.shutdown()
    assert said == "nothing"
    assert [path for path in asked if path.startswith("/api/models/")] == ["/api/models/runs/none"]


def test_whatever_loads_a_model_says_that_it_is_not_there(llama, policy, config, tmp_path, capsys):
    rows = Dataset.from_list(preference_rows(8, seed=1))
    none = str(tmp_path / "none")
    data = {"train_dataset": rows, "unlabeled_dataset": rows}
    for load in (
        lambda: SSRMTrainer(none, config(), **data),
        lambda: SSRMTrainer(none, config(preference_model="pairwise"), train_dataset=rows),
        lambda: load_reward_model(none),
        lambda: load_policy(none),
        lambda: SSRMRewardFunction(none),
        lambda: PairwiseJudge(none),
        lambda: load_ppo_models(policy, none),
        lambda: load_ppo_models(none, llama),
        lambda: generate_completions(none, rows.select_columns("prompt"), str(tmp_path / "completions")),
        lambda: evaluate(none, rows),
    ):
        with pytest.raises(ValueError, match=f"^There is no folder {none}; check the path.$"):
            load()
    rows.to_json(tmp_path / "rows.jsonl")
    given = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--model_name_or_path"]
    output = ["--output_dir", str(tmp_path / "run")]
    for argv in (
        ["label", *given, none, *output],
        # Before the first one is measured.
        ["evaluate", *given, llama, none],
        ["train", *given, none, *output, "--dry_run", "--bf16", "False", "--num_labeled", "4"],
    ):
        assert main(argv) == 2
        said = capsys.readouterr()
        assert (
            said.err.strip().splitlines()[-1]
            == f"trl-ssrm {argv[0]}: error: There is no folder {none}; check the path."
        )
        assert not said.out and not (tmp_path / "run").exists()


def test_adapter_says_that_its_base_is_not_there(tmp_path):
    none = str(tmp_path / "none")
    adapter = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": none}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(
        ValueError, match=f"^There is no folder {none}, the base model of {tmp_path}; check the path.$"
    ):
        load_reward_model(str(tmp_path))
