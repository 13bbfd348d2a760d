import re

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


def test_settings_of_the_paper_are_one_line(tmp_path):
    args = SSRMConfig.paper(str(tmp_path), bf16=False, learning_rate=1e-5, num_rounds=2)
    assert (args.confidence_threshold, args.pseudo_label_type, args.num_folds) == (0.8, "hard", 0)
    assert (args.output_dir, args.learning_rate, args.num_rounds) == (str(tmp_path), 1e-5, 2)
    other = SSRMConfig.paper(str(tmp_path), bf16=False, target_precision=0.9)
    assert (other.confidence_threshold, other.target_precision) == (None, 0.9)


def test_every_setting_is_described(tmp_path):
    own = SSRMConfig.__annotations__
    described = re.findall(r"^        (\w+) \(`", SSRMConfig.__doc__, flags=re.MULTILINE)
    assert described == list(own) and len(own) <= 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_folds": 1}, "`num_folds` must be 0 or at least 2"),
        ({"target_precision": 0.5}, r"`target_precision` must be in \(0.5, 1\)"),
        ({"confidence_threshold": 0.8, "target_precision": 0.9}, "both choose the threshold; set one of them"),
        (
            {"num_folds": 2, "load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "`num_folds` and `load_best_model_at_end` can't be combined",
        ),
        ({"comparison": "comparison.json"}, "set `preference_model='pairwise'` with it"),
        ({"freeze_backbone": True, "neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` adds new noise"),
        ({"comparison_orders": "one"}, r"`comparison_orders` must be one of \['random', 'both'\]"),
    ],
)
def test_setting_out_of_range_is_refused_with_its_name(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        SSRMConfig(str(tmp_path), bf16=False, **settings)
