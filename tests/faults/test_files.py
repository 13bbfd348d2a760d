"""Files that are damaged, of another run or place, or that can't be written: what is read and written, without a run."""

import hashlib
import json
import math
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from safetensors.torch import save_file
from transformers import TrainerState

from trl_ssrm.io.files import WriteError, delete_left_aside, read_record, write_record, written_aside
from trl_ssrm.io.storage import changed_facts, write_rows
from trl_ssrm.reporting.report import read_run
from trl_ssrm.rounds.checkpoints import CHECKPOINT_MARKER
from trl_ssrm.rounds.run_directory import INITIAL, RunDirectory
from trl_ssrm.rounds.run_identity import run_identity


FEATURES = Features({"pair": Value("int64")})
IDENTITY = {"format": 2, "seed": 1}


def flip(path, place: float = 0.97) -> None:
    """Turn a bit of a file over, if nothing else is said near its end, where no file has a space that says nothing."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path) -> None:
    path.write_bytes(b"")


DAMAGES = [flip, cut, empty]


def make_run(output_dir, seed: int = 1) -> RunDirectory:
    """Everything that two rounds leave."""
    run = RunDirectory(str(output_dir))
    run.start({**IDENTITY, "seed": seed}, resume=False)
    for round in (0, 1):
        weights = {"weight": torch.full((1, 64), float(10 * seed + round))}
        run.write_weights(run.weights_path(round), weights)
        run.write_fold(round, INITIAL, np.full(8, 10.0 * seed + round))
        run.write_state(round, TrainerState(global_step=10 * seed + round))
        run.write_round(round, {"round": round, "temperature": 1.0 * seed}, [], {})
        run.write_labeling(round, {"examples": []})
        parts = [Dataset.from_dict({"pair": [seed, round]}, features=FEATURES)]
        run.write_pseudo_labels(round, FEATURES, parts, {"kept": 2})
        checkpoint = run.round_dir(round) / f"checkpoint-{3 + round}"
        checkpoint.mkdir()
        save_file({"weight": torch.full((64,), float(seed))}, checkpoint / "model.safetensors")
        run.end_checkpoint(checkpoint)
    run.write_end("max_rounds", 1, "Trained.")
    return run


def read_all(run: RunDirectory, round: int) -> dict:
    """What can be read of a round, or the error that says why not, by the file."""

    def weights() -> float:
        model = torch.nn.Linear(64, 1, bias=False)
        run.read_weights(run.weights_path(round), model)
        return model.weight[0, 0].item()

    def logits() -> float | None:
        return None if (found := run.read_fold(round, INITIAL)) is None else found[0].item()

    def pairs() -> list | None:
        return None if (found := run.read_pseudo_labels(round)) is None else found[0]["pair"][:]

    readers = {
        "weights.safetensors": weights,
        "fold_1/logits.safetensors": logits,
        "trainer_state.json": lambda: run.read_state(round).global_step,
        "round.json": lambda: run.read_round(round)["facts"],
        "pseudo_labels.parquet": pairs,
        "pseudo_labels.json": pairs,
        "checkpoint-4/model.safetensors": lambda: run.last_checkpoint(round),
        "checkpoint-4/checkpoint_complete": lambda: run.last_checkpoint(round),
    }
    found = {}
    for name, read in readers.items():
        try:
            found[name] = read()
        except ValueError as error:
            found[name] = str(error)
    return found


FILES = list(read_all(RunDirectory("nowhere"), 1))


def place_of(run: RunDirectory, name: str) -> Path:
    """Where a file is: fold models are trained before round 0."""
    return run.round_dir(0 if name.startswith("fold_") else 1) / name


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_never_taken_for_what_was_written(tmp_path, caplog, name, damage):
    run = make_run(tmp_path)
    expected = read_all(run, 1)
    damage(place_of(run, name))
    found = read_all(run, 1)
    path = str(place_of(run, name.partition("/")[0]))
    assert found[name] is None or (
        isinstance(found[name], str) and path in found[name] and "copy in its" in found[name]
    )
    if found[name] is None:
        assert path in caplog.text or path.replace(".parquet", ".json") in caplog.text
    # The others are as they were.
    related = {other for other in FILES if other.split("/")[0].split(".")[0] == name.split("/")[0].split(".")[0]}
    assert {other: found[other] for other in FILES if other not in related} == {
        other: expected[other] for other in FILES if other not in related
    }


@pytest.mark.parametrize("place", [0.0, 0.02, 0.2, 0.4, 0.6, 0.8, 0.999])
@pytest.mark.parametrize("name", ["round.json", "weights.safetensors", "pseudo_labels.json", "trainer_state.json"])
def test_bit_may_be_flipped_anywhere(tmp_path, name, place):
    run = make_run(tmp_path)
    expected = read_all(run, 1)[name]
    flip(place_of(run, name), place)
    found = read_all(run, 1)[name]
    # Space between values says nothing.
    assert found == expected or found is None or "copy in its" in found


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("source", ["run", "round"])
def test_file_of_another_run_or_round_is_not_used(tmp_path, name, source):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", seed=2)
    directory = other.round_dir(1) if source == "run" else run.round_dir(0)
    if name.startswith("checkpoint"):
        # A whole one: its files fit one another.
        shutil.rmtree(run.round_dir(1) / "checkpoint-4")
        shutil.copytree(next(directory.glob("checkpoint-*")), run.round_dir(1) / "checkpoint-4")
    else:
        for each in {name, name.replace("pseudo_labels.parquet", "pseudo_labels.json")}:
            source_file = (
                place_of(other, each) if source == "run" else run.round_dir(0) / each.replace("fold_1", "fold_0")
            )
            shutil.copyfile(source_file, place_of(run, each))
    found = read_all(run, 1)[name]
    assert found is None or "another run" in found


def test_damaged_checkpoint_leads_to_the_one_before(tmp_path, caplog):
    run = make_run(tmp_path)
    later = run.round_dir(1) / "checkpoint-9"
    shutil.copytree(run.round_dir(1) / "checkpoint-4", later)
    run.end_checkpoint(later)
    assert run.last_checkpoint(1) == str(later)
    flip(later / "model.safetensors")
    assert run.last_checkpoint(1) == str(run.round_dir(1) / "checkpoint-4")
    assert f"{later} is damaged; the round goes on from the checkpoint before it" in caplog.text
    # A file that is not of it may be half of what a killed process wrote.
    (run.round_dir(1) / "checkpoint-4" / "optimizer.pt").touch()
    assert run.last_checkpoint(1) is None


@pytest.mark.parametrize("name", ["weights.safetensors", "trainer_state.json"])
def test_round_whose_end_is_damaged_is_trained_again(tmp_path, caplog, name):
    run = make_run(tmp_path)
    assert run.is_trained(1) and not run.is_trained(2)
    flip(place_of(run, name))
    assert not run.is_trained(1)
    assert "ound 1 is trained again" in caplog.text and str(place_of(run, name)) in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_settings_of_a_run_are_refused(tmp_path, damage):
    run = make_run(tmp_path)
    damage(run.root / "run.json")
    with pytest.raises(ValueError, match=r"run.json is damaged, or of another version.*put a copy in its place"):
        run.start(IDENTITY, resume=True)
    with pytest.raises(ValueError, match="run.json is damaged"):
        read_run(str(tmp_path))


@pytest.mark.parametrize("was", [{}, {"format": 1}])
def test_run_of_another_version_is_refused(tmp_path, was):
    run = make_run(tmp_path)
    # The first format had no checksums, and did not say that it was one.
    (run.root / "run.json").write_text(json.dumps({**was, "seed": 1}))
    with pytest.raises(ValueError, match="started by another version of trl-ssrm.*go on with that version"):
        run.start(IDENTITY, resume=True)
    # Its report is for people, who may want it.
    (run.root / "round_0" / "round.json").write_text(json.dumps({"facts": {"round": 0}}))
    assert read_run(str(tmp_path)).round_history[0] == {"round": 0}


@pytest.mark.parametrize("name", ["round_1/labeling.json", "round_1/round.json", "end.json"])
def test_report_of_damaged_facts_is_refused(tmp_path, name):
    run = make_run(tmp_path)
    assert read_run(str(tmp_path)).end["kept_round"] == 1
    flip(run.root / name)
    with pytest.raises(ValueError, match="is damaged.*no report of this run"):
        read_run(str(tmp_path))


def test_rows_of_a_stream_that_are_damaged_are_written_again(tmp_path):
    rows = [{"text": f"row {number}"} for number in range(10)]
    path = write_rows(tmp_path / "pool", rows)
    content = path.read_bytes()
    for damage in DAMAGES:
        damage(path)
        assert write_rows(tmp_path / "pool", rows) == path and path.read_bytes() == content
    # As left by a process that was killed at it.
    (tmp_path / "pool" / ".rows.123").write_bytes(b"half")
    shutil.rmtree(path.parent)
    path.parent.mkdir()
    assert write_rows(tmp_path / "pool", rows).read_bytes() == content
    assert [each.name for each in (tmp_path / "pool").iterdir()] == [path.parent.name]


def test_what_killed_processes_left_aside_is_deleted_at_resumption(tmp_path):
    run = make_run(tmp_path)
    left, kept = run.root / "round_1" / ".weights.safetensors.123", run.root / ".hidden"
    left.touch()
    kept.touch()
    run.start({**IDENTITY, "seed": 1}, resume=True)
    assert not left.exists() and kept.exists()
    delete_left_aside(tmp_path / "nowhere")


# ---- What can't be written ----


@pytest.fixture
def no_room():
    """Let no file of this process grow over 4 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_large(run: RunDirectory, kind: str) -> None:
    if kind == "weights":
        run.write_weights(run.weights_path(2), {"weight": torch.randn(64, 64)})
    elif kind == "pseudo_labels":
        rows = Dataset.from_dict({"pair": np.random.default_rng(0).integers(0, 1 << 60, 4096)}, features=FEATURES)
        run.write_pseudo_labels(2, FEATURES, [rows], {})
    else:
        run.write_round(2, {"long": "x" * 8192}, [], {})


@pytest.mark.parametrize("kind", ["weights", "pseudo_labels", "round"])
def test_file_that_does_not_fit_is_named_and_not_left_in_parts(tmp_path, no_room, kind):
    run = make_run(tmp_path)
    with pytest.raises(WriteError, match=rf"round_2/{kind}.*can't be written \(.*File too large.*make room") as raised:
        write_large(run, kind)
    assert "train(resume_from_checkpoint=True)" in str(raised.value)
    assert list(run.round_dir(2).iterdir()) == []


@pytest.fixture(params=["full", "read-only"])
def small_disk(request, tmp_path):
    """A file system of 64 KiB, or one that must not be written."""
    directory = tmp_path / "disk"
    directory.mkdir()
    options = "size=64k" if request.param == "full" else "ro"
    if os.system(f"mount -t tmpfs -o {options} tmpfs {directory} 2>/dev/null"):
        pytest.skip("mounting a file system is not permitted here")
    yield directory
    os.system(f"umount {directory}")


def test_disk_that_is_full_or_read_only_gives_a_sentence(small_disk):
    run = RunDirectory(str(small_disk / "run"))
    try:
        run.acquire()
    except WriteError as error:
        assert f"{run.root / 'lock'} can't be written (Read-only file system)" in str(error)
        with pytest.raises(WriteError, match=r"run.json can't be written \(Read-only file system"):
            run.start(IDENTITY, resume=False)
        return
    run.start(IDENTITY, resume=False)
    with pytest.raises(WriteError, match="round_0/weights.safetensors can't be written .*No space left on device"):
        run.write_weights(run.weights_path(0), {"weight": torch.randn(256, 256)})
    # What was there is whole, and there is room again for something smaller.
    run.write_weights(run.weights_path(0), {"weight": torch.randn(8, 8)})
    assert run.has_weights(run.weights_path(0))
    run.release()


def test_errors_that_are_not_of_the_disk_stay_what_they_are(tmp_path):
    for error in (KeyError("x"), ConnectionResetError(104, "reset"), RuntimeError("shapes differ")):
        with pytest.raises(type(error)), written_aside(tmp_path / "file"):
            raise error


def test_pairs_that_are_damaged_are_made_again_before_their_round_and_refused_when_they_are_read(tmp_path, caplog):
    run = make_run(tmp_path)
    path = run.round_dir(1) / "pseudo_labels.parquet"
    cut(path)
    with pytest.raises(ValueError, match="pseudo_labels.parquet is damaged; put a copy in its place"):
        run.read_pseudo_labels(1)
    with pytest.raises(
        ValueError, match="The pseudo-labels of round 1 in .* are missing or damaged; put copies in their place"
    ):
        run.read_labels(1)
    assert f"{path} is damaged." in caplog.text and "made again" not in caplog.text
    assert not run.has_pseudo_labels(1)
    assert f"{path} is damaged and is made again." in caplog.text
    path.unlink()
    with pytest.raises(ValueError, match="pseudo_labels.parquet is missing; put a copy in its place"):
        run.read_pseudo_labels(1)
    assert run.read_pseudo_labels(2) is None


def test_what_can_not_be_deleted_is_named(tmp_path):
    run = make_run(tmp_path)
    # A full disk refuses it on some file systems, a folder on all of them.
    marker = run.round_dir(1) / "checkpoint-4" / CHECKPOINT_MARKER
    for path in (marker, run.weights_path(0)):
        path.unlink()
        path.mkdir()
    with pytest.raises(WriteError, match=f"{marker} can't be written"):
        run.end_checkpoint(marker.parent)
    with pytest.raises(WriteError, match=f"{run.root} can't be written"):
        run.prune_weights({1})


def test_rows_that_do_not_fit_are_named_and_those_that_can_not_be_read_are_not(tmp_path):
    rows = [{"text": "x" * 1000}] * 5000
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, before[1]))
    try:
        with pytest.raises(WriteError, match=f"{tmp_path / 'pool'} can't be written"):
            write_rows(tmp_path / "pool", rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))

    def unreadable():
        yield from rows
        raise FileNotFoundError(2, "No such file or directory", "elsewhere")

    with pytest.raises(FileNotFoundError, match="elsewhere"):
        write_rows(tmp_path / "pool", unreadable())
    path = write_rows(tmp_path / "pool", rows)
    # Of `datasets`: what it has made, and what it was making when its process was killed.
    (path.parent / "cache-0123.arrow").touch()
    (path.parent / "tmpabcdef").touch()
    assert write_rows(tmp_path / "pool", rows) == path
    assert {each.name for each in path.parent.iterdir()} == {"rows.arrow", "cache-0123.arrow"}


def test_record_says_why_it_is_not_read(tmp_path):
    path = tmp_path / "record.json"
    with pytest.raises(ValueError, match="record.json is missing"):
        read_record(path)
    write_record(path, {"a": 1.5, "b": None}, "mine")
    assert read_record(path, "mine") == read_record(path) == {"a": 1.5, "b": None}
    with pytest.raises(ValueError, match="belongs to another run or round"):
        read_record(path, "yours")
    path.write_text("[1]")
    with pytest.raises(ValueError, match="is damaged"):
        read_record(path)


def test_numbers_that_json_has_no_word_for_are_null_in_files(tmp_path):
    path = tmp_path / "record.json"
    value = {"a": [math.inf, {"b": math.nan}, 1e308], "c": (-math.inf, np.float64("nan")), "d": "Infinity"}
    write_record(path, value, "mine")

    def refuse(constant: str):
        raise AssertionError(constant)

    json.loads(path.read_text(), parse_constant=refuse)
    assert read_record(path, "mine") == {"a": [None, {"b": None}, 1e308], "c": [None, None], "d": "Infinity"}
    assert changed_facts(path, {**value, "d": 1}) == "`d` ('Infinity' then, 1 now)"
    # As files were that were written before.
    written = {"a": math.inf, "key": "mine"}
    checksum = hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**written, "sha256": checksum}))
    assert read_record(path, "mine") == {"a": math.inf}


def test_setting_that_is_infinite_is_told_from_others(config, tmp_path):
    def start(max_grad_norm: float, resume: bool) -> None:
        identity = run_identity(config(max_grad_norm=max_grad_norm), torch.nn.Linear(1, 1), {})
        RunDirectory(str(tmp_path)).start(identity, resume)

    start(math.inf, False)
    start(math.inf, True)
    with pytest.raises(ValueError, match=r"`max_grad_norm` \('inf' then, 1.0 now\)"):
        start(1.0, True)
