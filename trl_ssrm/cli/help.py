"""Texts of the help that are longer than a line, or shown in two places."""

TRAIN_HELP = "train a reward model on few labeled pairs and a pool without labels"
QUICKSTART_HELP = "train a small pretrained model on real text in minutes, without the hub or a GPU"

EPILOG = """\
examples:
  trl-ssrm quickstart
  trl-ssrm train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name labels.csv \\
      --unlabeled_dataset_name pool.csv --output_dir reward-model
  trl-ssrm evaluate --model_name_or_path reward-model --dataset_name test.csv
  trl-ssrm report reward-model
  trl-ssrm label --model_name_or_path reward-model --dataset_name completions.jsonl --output_dir preferences

`trl-ssrm COMMAND --help` shows the arguments of a command. `--debug` shows the traceback of an error.
"""

LABEL_EPILOG = """\
examples:
  trl-ssrm label --model_name_or_path reward-model --dataset_name completions.jsonl --output_dir preferences
  trl-ssrm label --model_name_or_path reward-model --dataset_name org/completions --dataset_split test \\
      --output_dir preferences --pairing all --min_confidence 0.8 --temperature 1.7
  trl dpo --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name preferences --output_dir policy

The rows have `prompt` and `completions`, or `prompt`, `completion_a` and `completion_b`. A pairwise model is recognized
by its files. To share the work among several processes: accelerate launch -m trl_ssrm.cli.main label ...
"""

EVALUATE_EPILOG = """\
examples:
  trl-ssrm evaluate --model_name_or_path reward-model --dataset_name test.csv
  trl-ssrm evaluate --model_name_or_path baseline reward-model --dataset_name test.jsonl --subset_column domain \\
      --output_file comparison.md
  trl-ssrm evaluate --model_name_or_path reward-model --dataset_name allenai/reward-bench --dataset_split filtered \\
      --benchmark rewardbench

With several models, the table has a paired test of every two of them.
"""

REPORT_EPILOG = """\
examples:
  trl-ssrm report reward-model
  trl-ssrm report reward-model --path report.html
"""

COMPLETION_EPILOG = """\
to install it for bash:
  trl-ssrm completion bash > ~/.local/share/bash-completion/completions/trl-ssrm
to install it for zsh, with `fpath+=(~/.zfunc)` before `compinit` in ~/.zshrc:
  trl-ssrm completion zsh > ~/.zfunc/_trl-ssrm
"""

TRAIN_EPILOG = """\
examples:
  trl-ssrm train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name labels.csv \\
      --unlabeled_dataset_name pool.csv --eval_dataset_name test.csv --output_dir reward-model
  trl-ssrm train --config train.yaml --dry_run
  trl-ssrm train --config train.yaml --learning_rate 2.0e-5 --num_processes 4 --accelerate_config multi_gpu
  trl-ssrm train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name org/preferences --num_labeled 2000 \\
      --num_calibration 500 --use_peft --learning_rate 1.0e-4

Labeled rows have `prompt`, `chosen` and `rejected`. Rows of the pool have `prompt`, `completion_a` and `completion_b`, or
`prompt` and `completions`, or the columns of labeled rows, whose order is then hidden from the model. Run the same
command again to resume an interrupted run. Unknown arguments are passed to `accelerate launch`. `--debug` shows the
traceback of an error.
"""

QUICKSTART_EPILOG = """\
examples:
  trl-ssrm quickstart
  trl-ssrm quickstart --num_labeled 200 --output_dir my-quickstart
  trl-ssrm quickstart --dataset_name trl-lib/ultrafeedback_binarized --model_name_or_path Qwen/Qwen3-0.6B \\
      --max_length 1024

Needs `pip install ".[demo]"`. The settings are in quickstart.yaml, beside the code of the command; to change
them, pass a copy as `--config`. Run the same command again to resume an interrupted run. `--debug` shows the traceback of
an error.
"""
