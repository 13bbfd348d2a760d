import sys
import time
from functools import partial

import pytest
import torch
from conftest import assert_same_weights, preference_rows, run_script, weights_of
from datasets import Dataset
from transformers import T5Config, T5ForSequenceClassification

from trl_ssrm.io.files import written_aside
from trl_ssrm.models.sharding import whole_weights
from trl_ssrm.rounds.run_directory import RunDirectory


pytestmark = pytest.mark.slow


run = partial(run_script, "run_script.py")


# A round on soft labels begins near its minimum, where rounding decides the first steps, so one round is compared. A linear
# model helps to label the pool for it.
SOFT = {"num_folds": 2, "pseudo_label_type": "soft", "num_rounds": 1, "round_init": "base", "pretrain_on_pool": False}


@pytest.mark.parametrize(("folds", "num_rounds"), [({}, 2), (SOFT, 1)])
def test_two_processes_select_the_pairs_that_one_selects(llama, tmp_path, folds, num_rounds):
    # A last batch that is not full would be filled up in two processes, and trained on as it is in one.
    settings = {"model": llama, "dataloader_drop_last": True, **folds}
    one = run(**settings, output_dir=str(tmp_path / "one"), per_device_train_batch_size=8)
    # The pool of the two is a stream, which one of them reads.
    two = run(
        num_processes=2, **settings, output_dir=str(tmp_path / "two"), per_device_train_batch_size=4, stream=True
    )
    assert len(one["kept"]) == num_rounds and all(one["kept"])
    assert two["kept"] == one["kept"]
    for mine, theirs in zip(one["confidence"], two["confidence"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-2)
    # They shared the work: the main process scored some of the shards only.
    assert 0 < len(two["scored"]) < len(one["scored"])


@pytest.mark.parametrize("pretrain_on_pool", [False, None])
def test_sharded_weights_are_read_by_the_same_linear_model(llama, tmp_path, pretrain_on_pool):
    settings = {"model": llama, "dataloader_drop_last": True, **SOFT, "pretrain_on_pool": pretrain_on_pool}
    two = run_script("fsdp_script.py", num_processes=2, **settings, output_dir=str(tmp_path / "two"))
    one = run(**settings, output_dir=str(tmp_path / "one"), per_device_train_batch_size=8)
    assert len(one["kept"]) == 1 and two["kept"] == one["kept"]
    assert two["confidence"][0] == pytest.approx(one["confidence"][0], abs=1e-2)
    # Under the initial weights: what it knows, or what it says for and against pretraining.
    fact = "log_loss_of_linear_model" if pretrain_on_pool is False else "log_loss_without_pretraining"
    assert two["facts"][0][fact] == pytest.approx(one["facts"][0][fact], abs=1e-3)
    assert two["facts"][0].get("is_pretrained") == one["facts"][0].get("is_pretrained")


def test_a_process_without_labels_to_score_learns_that_there_are_no_states(tokenizer, tmp_path):
    # The classifier of T5 gives no hidden states. The labels are one shard, so only one of the two processes reads them.
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    tokens = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": 0,
    }
    model = T5ForSequenceClassification(T5Config(vocab_size=len(tokenizer), num_labels=1, **sizes, **tokens))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), **SOFT, "shard_tokens": 100_000, "num_train_epochs": 1}
    two = run(num_processes=2, **settings, output_dir=str(tmp_path / "two"))
    assert "linear_model_has_learned" not in two["facts"][0]
    # A run that is over is opened again, though the initial weights are gone.
    assert run(num_processes=2, **settings, output_dir=str(tmp_path / "two"), resume=True)["facts"] == two["facts"]


# As `accelerate config` writes them, for processes of a CPU.
ZERO = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  zero_stage: {stage}
  zero3_init_flag: {init}
  zero3_save_16bit_model: true
  offload_optimizer_device: none
  offload_param_device: none
  deepspeed_multinode_launcher: standard
machine_rank: 0
mixed_precision: "no"
num_machines: 1
num_processes: 2
use_cpu: true
"""


@pytest.fixture(scope="module")
def with_whole_weights(llama, tmp_path_factory) -> dict:
    """A run in two processes that both hold all the weights."""
    settings = {"model": llama, "dataloader_drop_last": True}
    return {**settings, "result": run(num_processes=2, **settings, output_dir=str(tmp_path_factory.mktemp("whole")))}


@pytest.mark.parametrize("sharding", ["fsdp2", "zero2", "zero3"])
def test_sharded_weights_select_the_same_pairs_also_after_one_process_was_lost(with_whole_weights, tmp_path, sharding):
    run_sharded = partial(run_script, "fsdp_script.py", num_processes=2)
    if sharding != "fsdp2":
        pytest.importorskip("deepspeed")
        stage = int(sharding[-1])
        (tmp_path / "config.yaml").write_text(ZERO.format(stage=stage, init=str(stage == 3).lower()))
        launcher = (sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0")
        run_sharded = partial(run, *launcher, "--config_file", str(tmp_path / "config.yaml"))
    settings = {
        "model": with_whole_weights["model"],
        "dataloader_drop_last": True,
        "output_dir": str(tmp_path / "run"),
    }
    start = time.monotonic()
    # Each of the two scores one of the first two shards, and one of them dies with its own.
    if sharding == "fsdp2":
        assert run_sharded(**settings, kill_in_scoring_for=2) is None
    else:
        with pytest.raises(AssertionError, match="ChildFailedError|exits with return code"):
            run_sharded(**settings, kill_in_scoring_for=2)
    assert time.monotonic() - start < 60
    resumed, expected = run_sharded(**settings, resume=True), with_whole_weights["result"]
    assert len(expected["kept"]) == 2
    assert resumed["kept"] == expected["kept"]
    for mine, theirs in zip(resumed["confidence"], expected["confidence"], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-2)


# ---- Within one process ----


def test_finished_run_resumes_to_its_own_end(make_trainer):
    first = make_trainer()
    first.train()
    again = make_trainer()
    output = again.train(resume_from_checkpoint=True)
    assert_same_weights(weights_of(first.model), weights_of(again.model))
    assert again.round_history == first.round_history
    assert output.metrics["termination_reason"] == first.termination_reason


def test_directory_of_a_run_is_not_overwritten(make_trainer):
    make_trainer(num_rounds=0).train()
    with pytest.raises(ValueError, match="already holds a run"):
        make_trainer(num_rounds=0).train()


def test_resuming_nothing_is_refused(make_trainer):
    with pytest.raises(ValueError, match="There is no run to resume"):
        make_trainer().train(resume_from_checkpoint=True)


def test_resuming_from_elsewhere_is_refused(make_trainer, tmp_path):
    make_trainer(num_rounds=0).train()
    with pytest.raises(ValueError, match="is resumed from its `output_dir`"):
        make_trainer(num_rounds=0).train(resume_from_checkpoint=str(tmp_path / "elsewhere"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 1e-4}, "`learning_rate` (0.003 then, 0.0001 now)"),
        ({"confidence_threshold": 0.9}, "`confidence_threshold` (0.6 then, 0.9 now)"),
        ({"train_dataset": Dataset.from_list(preference_rows(16, seed=7))}, "`train_dataset`"),
        ({"unlabeled_dataset": Dataset.from_list(preference_rows(40, seed=7))}, "`unlabeled_dataset`"),
    ],
)
def test_resuming_with_other_settings_or_data_is_refused(make_trainer, change, named):
    make_trainer(num_rounds=1).train()
    with pytest.raises(ValueError, match="started with other settings or data") as raised:
        make_trainer(**{"num_rounds": 1, **change}).train(resume_from_checkpoint=True)
    assert named in str(raised.value)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damaged_pseudo_labels_are_found_and_made_again(make_trainer, damage):
    first = make_trainer(num_rounds=1)
    first.train()
    run = first.run
    # As if killed right after the selection.
    for name in ("round.json", "trainer_state.json", "weights.safetensors"):
        (run.round_dir(1) / name).unlink()
    weights = run.weights_path(0)
    retrained = make_trainer(num_rounds=0, output_dir=first.args.output_dir + "-again")
    retrained.train()
    run.write_weights(weights, whole_weights(retrained.model))
    path = run.round_dir(1) / "pseudo_labels.parquet"
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        content[:middle]
        if damage == "truncated"
        else content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    )
    again = make_trainer(num_rounds=1)
    again.train(resume_from_checkpoint=True)
    assert path.read_bytes() == content
    assert_same_weights(weights_of(first.model), weights_of(again.model))


def test_damaged_weights_end_the_run_with_a_sentence(make_trainer):
    trainer = make_trainer(num_rounds=0)
    trainer.train()
    path = trainer.run.weights_path(0)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="is missing or damaged"):
        make_trainer(num_rounds=0).train(resume_from_checkpoint=True)


def test_half_a_checkpoint_is_not_resumed_from(tmp_path):
    run = RunDirectory(str(tmp_path))
    for step, is_whole in ((3, True), (12, True), (15, False)):
        checkpoint = run.round_dir(0) / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
        if is_whole:
            run.end_checkpoint(checkpoint)
    assert run.last_checkpoint(0).endswith("checkpoint-12")
    assert run.last_checkpoint(1) is None


def test_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyError), written_aside(path) as aside:
        aside.write_text("half")
        raise KeyError
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_weights_of_another_model_are_refused(tmp_path):
    run = RunDirectory(str(tmp_path))
    run.write_weights(run.weights_path(0), {"weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="weights of another model"):
        run.read_weights(run.weights_path(0), torch.nn.Linear(2, 2, bias=False))
