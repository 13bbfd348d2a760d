import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import preference_rows
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trl_ssrm import NonFiniteScoreError
from trl_ssrm.data.sequences import PairedSequences
from trl_ssrm.io.storage import read_tensors, write_tensors
from trl_ssrm.scoring.batches import Scorer
from trl_ssrm.scoring.layout import choose_layout
from trl_ssrm.scoring.preference import scalar_logits
from trl_ssrm.scoring.score import score_pairs


@pytest.fixture(scope="module", params=["llama", "bert"])
def model_and_tokenizer(request):
    path = request.getfixturevalue(request.param)
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1), AutoTokenizer.from_pretrained(path)


def pairs_of(tokenizer, rows) -> PairedSequences:
    ids = {
        f"{name}_ids": tokenizer([row["prompt"] + row[name] for row in rows])["input_ids"]
        for name in ("chosen", "rejected")
    }
    return PairedSequences.from_tokenized(Dataset.from_dict(ids))


def score(model_and_tokenizer, pairs, batch_tokens=512, **settings) -> np.ndarray:
    model, tokenizer = model_and_tokenizer
    settings = {"batch_tokens": batch_tokens, "disable_tqdm": True, **settings}
    settings["layout"] = settings.get("layout") or choose_layout(model)
    scores = score_pairs(model, pairs, tokenizer.pad_token_id, Accelerator(cpu=True), **settings)
    return scalar_logits(scores)


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Sizes of the shards that are scored, one by one, with shards of a few sequences."""
    shards = []
    real = Scorer.score

    def count(scorer, sequences, *args):
        shards.append(len(sequences))
        return real(scorer, sequences, *args)

    monkeypatch.setattr("trl_ssrm.scoring.score.SHARD_TOKENS", 256)
    monkeypatch.setattr(Scorer, "score", count)
    return shards


def test_scores_are_those_of_the_model_one_by_one(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    rows = preference_rows(20)
    model.eval()
    with torch.inference_mode():
        rewards = [
            [
                model(**tokenizer(row["prompt"] + row[name], return_tensors="pt")).logits.item()
                for name in ("chosen", "rejected")
            ]
            for row in rows
        ]
    expected = np.array([chosen - rejected for chosen, rejected in rewards])
    np.testing.assert_allclose(score(model_and_tokenizer, pairs_of(tokenizer, rows)), expected, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_scores_do_not_depend_on_the_batch_size(model_and_tokenizer, batch_tokens):
    pairs = pairs_of(model_and_tokenizer[1], preference_rows(30))
    one, other = score(model_and_tokenizer, pairs), score(model_and_tokenizer, pairs, batch_tokens)
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_scores_do_not_depend_on_the_order_or_on_what_else_is_there(model_and_tokenizer):
    rows, tokenizer = preference_rows(30), model_and_tokenizer[1]
    alone = score(model_and_tokenizer, pairs_of(tokenizer, rows[:5]))
    among = score(model_and_tokenizer, pairs_of(tokenizer, rows[::-1]))[::-1][:5]
    np.testing.assert_allclose(alone, among, atol=1e-5)


def test_exchanging_the_sequences_of_a_pair_changes_the_sign_alone(model_and_tokenizer):
    rows, tokenizer = preference_rows(30), model_and_tokenizer[1]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    one, other = (score(model_and_tokenizer, pairs_of(tokenizer, each)) for each in (rows, swapped))
    assert np.array_equal(one, -other)


def test_each_sequence_is_scored_once(model_and_tokenizer, monkeypatch):
    rows, tokenizer = preference_rows(10), model_and_tokenizer[1]
    model, seen = model_and_tokenizer[0], []
    layout = choose_layout(model)
    handle = model.register_forward_pre_hook(lambda *args: seen.append(len(args[2]["input_ids"])), with_kwargs=True)
    score(model_and_tokenizer, pairs_of(tokenizer, rows + rows + rows[:3]), layout=layout)
    handle.remove()
    assert sum(seen) == 20


def test_training_mode_is_put_back(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    model.train()
    score(model_and_tokenizer, pairs_of(tokenizer, preference_rows(2)))
    assert model.training


def test_shards_on_disk_are_not_scored_again(model_and_tokenizer, tmp_path, counted):
    pairs = pairs_of(model_and_tokenizer[1], preference_rows(30))
    first = score(model_and_tokenizer, pairs, directory=tmp_path, key="k")
    num_shards = len(counted)
    assert num_shards > 3
    sorted(tmp_path.iterdir())[1].unlink()
    assert np.array_equal(score(model_and_tokenizer, pairs, directory=tmp_path, key="k"), first)
    assert len(counted) == num_shards + 1
    score(model_and_tokenizer, pairs, directory=tmp_path, key="other weights")
    assert len(counted) == 2 * num_shards + 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damaged_shard_is_found_and_scored_again(model_and_tokenizer, tmp_path, counted, damage, caplog):
    pairs = pairs_of(model_and_tokenizer[1], preference_rows(30))
    first = score(model_and_tokenizer, pairs, directory=tmp_path, key="k")
    path = min(tmp_path.iterdir())
    content = path.read_bytes()
    flipped = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
    path.write_bytes({"truncated": content[:-3], "flipped": flipped, "empty": b""}[damage])
    counted.clear()
    assert np.array_equal(score(model_and_tokenizer, pairs, directory=tmp_path, key="k"), first)
    assert len(counted) == 1


def test_nan_reward_is_named_and_the_other_shards_are_kept(model_and_tokenizer, tmp_path, monkeypatch):
    model, tokenizer = model_and_tokenizer
    monkeypatch.setattr("trl_ssrm.scoring.score.SHARD_TOKENS", 256)
    # With one prompt, so that several completions share a row.
    rows = [{**row, "prompt": "The same long prompt for all of them. "} for row in preference_rows(30)]
    rows[3]["chosen"] += "<|tools|>"
    poison = tokenizer.convert_tokens_to_ids("<|tools|>")
    pairs = pairs_of(tokenizer, rows)

    def spoil(module, args, output):
        return output.masked_fill((args[0] == poison)[..., None], float("nan"))

    layout = choose_layout(model)
    handle = model.get_input_embeddings().register_forward_hook(spoil)
    with pytest.raises(NonFiniteScoreError) as raised:
        score(model_and_tokenizer, pairs, layout=layout, directory=tmp_path, key="k")
    handle.remove()
    assert raised.value.rows == [3]
    assert "rows 3 of `dataset`" in str(raised.value)
    kept = list(tmp_path.iterdir())
    num_shards = int(kept[0].stem.split("-of-")[1])
    assert len(kept) == num_shards - 1 > 3


def test_rewards_are_float32_under_bfloat16_autocast(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    pairs = pairs_of(tokenizer, preference_rows(40))
    # The state is shared in a process, and remembers the precision that the first accelerator in it asked for.
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    with torch.no_grad():
        (head,) = (
            module for module in model.modules() if isinstance(module, torch.nn.Linear) and module.out_features == 1
        )
        before = head.weight.clone()
        head.weight.mul_(100)
    logits = score_pairs(model, pairs, tokenizer.pad_token_id, accelerator, "padded", 512, disable_tqdm=True)
    with torch.no_grad():
        head.weight.copy_(before)
    AcceleratorState._reset_state()
    assert not torch.equal(torch.tensor(logits), torch.tensor(logits).bfloat16().double())


def test_tensors_of_another_key_are_not_read(tmp_path):
    write_tensors(tmp_path / "file.safetensors", {"a": torch.arange(3)}, "key")
    assert read_tensors(tmp_path / "file.safetensors", "key")["a"].tolist() == [0, 1, 2]
    assert read_tensors(tmp_path / "file.safetensors", "other") is None
    assert read_tensors(tmp_path / "missing.safetensors", "key") is None


def test_batch_that_does_not_fit_into_memory_is_halved(model_and_tokenizer, caplog):
    model, tokenizer = model_and_tokenizer
    pairs, layout = pairs_of(tokenizer, preference_rows(30)), choose_layout(model)
    expected = score(model_and_tokenizer, pairs, layout=layout)
    sizes = []

    def refuse(module, args):
        sizes.append(args[0].numel())
        if args[0].numel() > 200:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = model.get_input_embeddings().register_forward_pre_hook(refuse)
    try:
        found = score(model_and_tokenizer, pairs, layout=layout)
        with pytest.raises(torch.OutOfMemoryError):
            # Nothing is left to halve where one sequence alone does not fit.
            row = {"prompt": "a" * 300, "chosen": "b", "rejected": "c"}
            score(model_and_tokenizer, pairs_of(tokenizer, [row]), layout=layout)
    finally:
        handle.remove()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert max(sizes[:2]) > 200
    assert "does not fit into memory; going on with 256 tokens a batch" in caplog.text
