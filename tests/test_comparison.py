"""Where the comparison of a pairwise model comes from: a file, the model, or the paper."""

import shutil
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from trl_ssrm import Comparison
from trl_ssrm.models.pairwise import prepare_pairwise


OWN = Comparison(template="{{ messages[0].content }} {{ responses[0] }} {{ responses[1] }}", labels=["a", "b"])


@pytest.fixture
def comparison_of(policy, config):
    def prepare(model=policy, **settings) -> Comparison:
        args = config(preference_model="pairwise", max_length=64, **settings)
        comparison, *_ = prepare_pairwise(model, args, AutoTokenizer.from_pretrained(policy), None)
        return comparison

    return prepare


@pytest.fixture
def trained_on_own(policy, tmp_path) -> str:
    """Directory of a model that was saved with a comparison of its own."""
    directory = str(tmp_path / "trained")
    shutil.copytree(policy, directory)
    OWN.save_pretrained(directory)
    return directory


def test_comparison_is_given_as_a_file_or_its_directory(comparison_of, tmp_path):
    OWN.save_pretrained(str(tmp_path))
    for path in (tmp_path, tmp_path / "comparison.json"):
        assert Comparison.from_pretrained(str(path)) == OWN
        assert comparison_of(comparison=str(path)) == replace(OWN, max_length=64)
    other_name = tmp_path / "mine.json"
    (tmp_path / "comparison.json").rename(other_name)
    assert Comparison.from_pretrained(str(other_name)) == OWN


def test_comparison_saved_with_the_model_is_the_default(comparison_of, trained_on_own):
    assert comparison_of(trained_on_own) == replace(OWN, max_length=64)
    assert comparison_of(trained_on_own, comparison=trained_on_own) == replace(OWN, max_length=64)


def test_comparison_of_the_paper_is_the_default_of_other_models(comparison_of, policy):
    # Its labels are no tokens of this tokenizer, which names them.
    with pytest.raises(ValueError, match="The label 'A' is 0 tokens of this tokenizer; choose `labels` of one token"):
        comparison_of()


def test_model_trained_on_another_comparison_is_refused(comparison_of, trained_on_own, tmp_path):
    replace(OWN, labels=["c", "d"]).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"trained was trained on another comparison .* leave `comparison` out"):
        comparison_of(trained_on_own, comparison=str(tmp_path))


def test_comparison_that_is_not_there_is_named(comparison_of, tmp_path):
    missing = str(tmp_path / "none.json")
    with pytest.raises(ValueError, match=f"^There is no file {missing}; check the path of the comparison.$"):
        Comparison.from_pretrained(missing)
    with pytest.raises(ValueError, match=f"^There is no file {missing}"):
        comparison_of(comparison=missing)
    with pytest.raises(ValueError, match=f"^There is no folder {tmp_path / 'none'}, given as `comparison`; check"):
        comparison_of(comparison=str(tmp_path / "none"))
    assert Comparison.from_pretrained(str(tmp_path)) is None
    with pytest.raises(ValueError, match="has no comparison.json; give the path of the file"):
        comparison_of(comparison=str(tmp_path))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"labels": ["a"]}', '{"labels": "ab"}', '{"prompt": "a"}', "\xff"]
)
def test_damaged_comparison_is_named(content, tmp_path):
    path = tmp_path / "comparison.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"comparison.json is not a comparison \(.*\); correct it"):
        Comparison.from_pretrained(str(tmp_path))
