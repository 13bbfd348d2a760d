import pytest
import yaml
from trl import RewardConfig, TrlParser

from trl_ssrm import SSRMConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_rounds", -1),
        ("confidence_threshold", 0.49),
        ("confidence_threshold", 1.0),
        ("confidence_threshold", float("nan")),
        ("round_init", "restart"),
        ("pool_per_round", "half"),
        ("pseudo_label_type", "medium"),
        ("pseudo_label_weight", -0.1),
        ("pseudo_label_weight", float("inf")),
        ("round_num_train_epochs", 0),
        ("score_batch_tokens", 0),
        ("max_unlabeled_samples", 0),
    ],
)
def test_wrong_value_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        SSRMConfig(str(tmp_path), bf16=False, **{name: value})


def test_edges_of_the_ranges_are_accepted(tmp_path):
    SSRMConfig(str(tmp_path), bf16=False, num_rounds=0, confidence_threshold=0.5, pseudo_label_weight=0.0)


def test_yaml_and_command_line_are_parsed_as_any_trl_config(tmp_path):
    config = {
        "output_dir": str(tmp_path),
        "num_rounds": 5,
        "confidence_threshold": 0.9,
        "round_init": "base",
        "bf16": False,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (args,) = TrlParser((SSRMConfig,)).parse_args_and_config(
        ["--config", str(tmp_path / "config.yaml"), "--confidence_threshold", "0.7", "--keep_best_round", "true"]
    )
    assert (args.num_rounds, args.confidence_threshold, args.round_init, args.keep_best_round) == (
        5,
        0.7,
        "base",
        True,
    )


def test_defaults_of_reward_config_are_kept(tmp_path):
    ours, theirs = SSRMConfig(str(tmp_path), bf16=False).to_dict(), RewardConfig(str(tmp_path), bf16=False).to_dict()
    assert {name: ours[name] for name in theirs} == theirs
