"""Runs that are killed, that find no room, or that are started twice."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_same_weights, weights_of
from transformers import TrainerCallback

from trl_ssrm import SSRMTrainer
from trl_ssrm.io.files import WriteError
from trl_ssrm.rounds.interruption import leaving_with_advice


pytestmark = pytest.mark.slow


ROOT = Path(__file__).parents[2]


@pytest.mark.any_trl
def test_faulty_run_ends_as_the_one_that_was_left_alone():
    # Every place and every signal; the setups are drawn.
    faults = ("--num_kills", "6", "--num_full_disks", "1", "--num_damages", "1")
    command = [sys.executable, "-m", "tests.faults.campaign", *faults, "--setups", "full-1", "lora-1", "lora-2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "8 faults, 8 survived" in done.stdout, done.stdout + done.stderr[-3000:]


# ---- Damage in a run ----


def test_round_that_is_damaged_is_trained_again_from_its_last_checkpoint_that_is_whole(make_trainer, caplog):
    settings = {"num_rounds": 0, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
    first = make_trainer(**settings)
    # As after a kill: a run that is over has no checkpoints.
    first.run.prune_at_end = lambda needed: None
    first.train()
    expected = weights_of(first.model)
    root = first.run.round_dir(0)
    (root / "round.json").unlink()
    weights, checkpoint = root / "weights.safetensors", root / "checkpoint-12"
    weights.write_bytes(weights.read_bytes()[:-100])
    model = checkpoint / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    again = make_trainer(**settings)
    again.run.prune_at_end = lambda needed: None
    again.train(resume_from_checkpoint=True)
    assert_same_weights(weights_of(again.model), expected)
    assert f"{weights} is damaged" in caplog.text and f"{checkpoint} is damaged" in caplog.text
    assert again.run.last_checkpoint(0) == str(checkpoint)


def test_pseudo_labels_that_the_end_of_the_rounds_depends_on_are_not_done_without(make_trainer):
    settings = {"num_rounds": 2, "confidence_threshold": 0.5}
    first = make_trainer(**settings)
    first.train()
    # As if killed before the labels of round 2, whose change since round 1 decides whether there is one.
    shutil.rmtree(first.run.round_dir(2), ignore_errors=True)
    (first.run.root / "end.json").unlink()
    table = first.run.round_dir(1) / "pseudo_labels.parquet"
    table.write_bytes(table.read_bytes()[:-1])
    again = make_trainer(**settings)
    with pytest.raises(ValueError, match=re.escape(str(table.parent)) + ".*missing or damaged.*copies in their place"):
        again.train(resume_from_checkpoint=True)


def test_scores_that_lie_at_the_place_of_others_are_not_taken_for_theirs(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ssrm.scoring.score.SHARD_TOKENS", 256)
    trainer = make_trainer()
    pairs, directory = trainer.data.pool.pairs, tmp_path / "scores"
    expected = trainer.score_pairs(pairs, "unlabeled_dataset", directory=directory, key="key").logits
    first, second, *_ = sorted(directory.iterdir())
    first.rename(directory / "other")
    second.rename(first)
    (directory / "other").rename(second)
    found = trainer.score_pairs(pairs, "unlabeled_dataset", directory=directory, key="key").logits
    assert found.tolist() == expected.tolist()


def test_best_checkpoint_that_is_damaged_is_not_loaded(llama, config, labeled, unlabeled, held_out):
    class Damage(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            for model in trainer.run.round_dir(0).glob("checkpoint-*/model.safetensors"):
                model.write_bytes(model.read_bytes()[:-1] + b"x")

    strategy = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    # Where nothing is learned, the first is the best.
    args = config(num_rounds=0, learning_rate=0.0, num_train_epochs=2, **strategy)
    data = {"train_dataset": labeled, "unlabeled_dataset": unlabeled, "eval_dataset": held_out}
    trainer = SSRMTrainer(llama, args, callbacks=[Damage()], **data)
    with pytest.raises(ValueError, match="checkpoint-. is damaged, and it is the best of round 0"):
        trainer.train()


# ---- Signals ----


def test_interruption_says_how_to_go_on(make_trainer, capfd):
    trainer = make_trainer()
    real = trainer.run.write_round

    def interrupt(*args) -> None:
        raise KeyboardInterrupt

    trainer.run.write_round = interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "Interrupted in round 0. Go on with `train(resume_from_checkpoint=True)`" in capfd.readouterr().err
    # Nothing of it is left: the same trainer may go on, and signals are nobody's.
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    trainer.run.write_round = real
    trainer.train(resume_from_checkpoint=True)
    assert trainer.termination_reason is not None
    assert "Interrupted" not in capfd.readouterr().err


def test_handlers_of_others_are_left_alone():
    def own(number, frame) -> None:
        pass

    signal.signal(signal.SIGTERM, own)
    try:
        with leaving_with_advice(lambda: "advice"):
            assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with leaving_with_advice(lambda: "advice"):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ---- Two runs in one directory ----

HOLD = "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1, flush=True); time.sleep(60)"


@pytest.fixture
def other_process(tmp_path):
    """A process that is at work in the output directory."""
    lock = tmp_path / "run" / "_rounds" / "lock"
    lock.parent.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"1\n"
    yield process
    process.kill()
    process.wait()


def test_second_run_in_a_directory_is_refused_while_the_first_is_alive(
    make_trainer, llama, config, labeled, unlabeled, other_process, monkeypatch
):
    trainer = make_trainer(num_rounds=0)
    with monkeypatch.context() as patch:
        patch.setattr("trl_ssrm.rounds.run_root.SECONDS_TO_WAIT_FOR_LOCK", 0.1)
        with pytest.raises(ValueError, match="Another run is at work in .*run; wait until it ends"):
            trainer.train()
        # A stream would be written over that of the other run.
        with pytest.raises(ValueError, match="Another run is at work"):
            args = config(num_rounds=0, max_unlabeled_samples=8)
            SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled.to_iterable_dataset())
        assert not trainer.run.has_run and not (trainer.run.root / "pool").exists()
    # However it ends.
    os.kill(other_process.pid, signal.SIGKILL)
    trainer.train()
    # Once it is over, the directory is free for the next process.
    assert trainer.run.has_run
    make_trainer(num_rounds=0).train(resume_from_checkpoint=True)


def test_file_system_without_locks_is_told_of(make_trainer, monkeypatch, caplog):
    def refuse(*args, **kwargs) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    make_trainer(num_rounds=0).run.acquire()
    assert "is on a file system without locks; start one run at a time in it" in caplog.text


def test_tokens_of_a_pool_that_do_not_fit_are_named(llama, config, labeled, unlabeled, tmp_path):
    def make(output_dir: Path) -> SSRMTrainer:
        args = config(output_dir=str(output_dir), num_rounds=0, max_unlabeled_samples=32)
        return SSRMTrainer(llama, args, train_dataset=labeled, unlabeled_dataset=unlabeled.to_iterable_dataset())

    # The rows fit, their tokens do not.
    (rows,) = make(tmp_path / "one").run.root.glob("pool/*/rows.arrow")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (rows.stat().st_size + 100, before[1]))
    place = tmp_path / "other" / "_rounds" / "pool" / rows.parent.name
    try:
        with pytest.raises(WriteError, match=f"^{place} can't be written .*make room"):
            make(tmp_path / "other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    make(tmp_path / "other").train()


def test_checkpoint_that_does_not_fit_is_named(make_trainer):
    trainer = make_trainer(num_rounds=0, save_strategy="steps", save_steps=3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The weights fit, the optimizer with twice as many numbers does not.
    size = sum(value.numel() for value in trainer.model.parameters()) * torch.float32.itemsize
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(1.5 * size), before[1]))
    try:
        with pytest.raises(OSError, match="checkpoint-3 can't be written .*train\\(resume_from_checkpoint=True\\)"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    make_trainer(num_rounds=0, save_strategy="steps", save_steps=3).train(resume_from_checkpoint=True)
