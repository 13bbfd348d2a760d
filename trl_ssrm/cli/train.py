"""
`trl-ssrm train`: few labeled pairs and a pool without labels become a reward model.

The command reads its arguments and starts this file through accelerate, in one process or several, as `trl reward` does.
"""

import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from datasets import Dataset
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ErrorHandler
from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from .. import SSRMConfig, SSRMTrainer
from ..io.hub import check_model_is_there
from ..io.sources import load_data, load_splits
from .arguments import TrainingParser
from .dry_run import dry_run
from .errors import ERROR, INTERRUPTED, sentence, tell
from .main import TRAIN_HELP, take_debug


EPILOG = """\
examples:
  trl-ssrm train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name labels.csv \\
      --unlabeled_dataset_name pool.csv --eval_dataset_name test.csv --output_dir reward-model
  trl-ssrm train --config train.yaml --dry_run
  trl-ssrm train --config train.yaml --learning_rate 2.0e-5 --num_processes 4 --accelerate_config multi_gpu
  trl-ssrm train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name org/preferences --num_labeled 2000 \\
      --num_calibration 500 --use_peft --learning_rate 1.0e-4

Labeled pairs have `prompt`, `chosen` and `rejected`; the pool has `prompt`, `completion_a` and `completion_b`, or
`prompt` and `completions`, or pairs whose labels are hidden. The same command again goes on with a run that was
interrupted. What is no argument here goes to `accelerate launch`. `--debug` shows the traceback of an error.
"""


@dataclass
class TrainArguments:
    """
    Arguments of `trl-ssrm train` besides those of the trainer and the model.

    Args:
        dataset_name (`str`, *optional*):
            Labeled pairs: what [`load_data`] takes.
        dataset_config (`str`, *optional*):
            Configuration of a dataset of the hub.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split with the labeled pairs.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split with held-out pairs, if the dataset has it and `eval_dataset_name` is not given.
        num_labeled (`int`, *optional*):
            Number of rows whose labels are used, drawn from the seed. If `None`, all of them.
        num_calibration (`int`, *optional*, defaults to `0`):
            Number of further labeled rows to calibrate the confidence on.
        unlabeled_dataset_name (`str`, *optional*):
            Pool. If `None`, the rows of `dataset_name` beyond these two numbers, their labels hidden.
        eval_dataset_name (`str`, *optional*):
            Held-out labeled pairs to measure on.
        calibration_dataset_name (`str`, *optional*):
            Held-out labeled pairs to calibrate the confidence on, instead of `num_calibration`.
        padding_token (`str`, *optional*):
            Padding token, which for PPO must not be the end token. If `None`, that of the tokenizer.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to check data, model and settings, say what each round would cost, and end.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Labeled pairs: hub ID, folder, or file (JSON lines, CSV, TSV, Parquet)."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset of the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split with the labeled pairs."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split with held-out pairs, where there is no `eval_dataset_name`."}
    )
    num_labeled: int | None = field(
        default=None, metadata={"help": "Rows whose labels are used, drawn from the seed. Default: all."}
    )
    num_calibration: int = field(default=0, metadata={"help": "Further labeled rows, to calibrate the confidence on."})
    unlabeled_dataset_name: str | None = field(
        default=None, metadata={"help": "Pool. Default: the other rows of `dataset_name`, labels hidden."}
    )
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Held-out labeled pairs to measure on."})
    calibration_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Held-out labeled pairs to calibrate the confidence on, instead of `num_calibration`."},
    )
    padding_token: str | None = field(
        default=None,
        metadata={"help": "Padding token. PPO needs one that is not the end token. Default: that of the tokenizer."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check data, model and settings, say what each round would cost, and end."},
    )


def make_parser(**kwargs: Any) -> TrainingParser:
    """[`TrainingParser`]: the arguments of the command, its own first."""
    words = f"{TRAIN_HELP[0].upper()}{TRAIN_HELP[1:]}."
    types = (TrainArguments, SSRMConfig, ModelConfig)
    return TrainingParser(types, prog="trl-ssrm train", description=words, epilog=EPILOG, **kwargs)


def make_trainer(train_args: TrainArguments, training_args: SSRMConfig, model_args: ModelConfig) -> SSRMTrainer:
    """
    Load the data and the model, and check both.

    Args:
        train_args ([`TrainArguments`]):
            Arguments of the command.
        training_args ([`SSRMConfig`]):
            Those of the trainer.
        model_args ([`~trl.ModelConfig`]):
            Those of the model.

    Returns:
        [`SSRMTrainer`]: ready to train.

    Raises:
        ValueError: If something is missing or can't be used; the message names it.
    """
    for name, words in (("model_name_or_path", "the model to start from"), ("dataset_name", "the labeled pairs")):
        if getattr(model_args if name == "model_name_or_path" else train_args, name) is None:
            raise ValueError(f"Pass `--{name}`, {words}.")
    # Text on the command line, a dictionary by now.
    given = training_args.model_init_kwargs
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(given if isinstance(given, dict) else {}),
    }
    data = load_pairs(train_args, training_args.seed)
    check_model_is_there(model_args.model_name_or_path, revision=model_args.model_revision)
    tokenizer = None
    if train_args.padding_token is not None:
        tokenizer = AutoTokenizer.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            trust_remote_code=training_args.trust_remote_code,
        )
        if train_args.padding_token not in tokenizer.get_vocab():
            raise ValueError(
                f"`padding_token` {train_args.padding_token!r} is not in the vocabulary; choose one that is."
            )
        tokenizer.pad_token = train_args.padding_token
    return SSRMTrainer(
        model=str(model_args.model_name_or_path),
        args=training_args,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        **data,
    )


def load_pairs(args: TrainArguments, seed: int) -> dict[str, Dataset]:
    """
    Load the datasets of a run.

    Args:
        args ([`TrainArguments`]):
            Which they are.
        seed (`int`):
            Draws the rows whose labels are used, where not all of them are.

    Returns:
        `dict[str, Dataset]`: the datasets by what [`SSRMTrainer`] calls them.

    Raises:
        ValueError: If one can't be loaded, there are too few rows, or none is left for the pool.
    """
    assert args.dataset_name is not None
    splits = load_splits(args.dataset_name, args.dataset_config)
    rows = splits.get(args.dataset_train_split)
    rows = load_data(args.dataset_name, args.dataset_train_split, args.dataset_config) if rows is None else rows
    if args.num_calibration and args.calibration_dataset_name is not None:
        raise ValueError("`num_calibration` and `calibration_dataset_name` both calibrate; pass one of them.")
    num_labeled = len(rows) - args.num_calibration if args.num_labeled is None else args.num_labeled
    if num_labeled < 1 or args.num_calibration < 0 or len(rows) < num_labeled + args.num_calibration:
        raise ValueError(
            f"`num_labeled` is {args.num_labeled} and `num_calibration` {args.num_calibration}, but {args.dataset_name} has "
            f"{len(rows)} rows; lower the two numbers, and leave one label at least."
        )
    if num_labeled < len(rows):
        rows = rows.shuffle(seed=seed)
    num_known = num_labeled + args.num_calibration
    data = {"train_dataset": rows.select(range(num_labeled))}
    if args.unlabeled_dataset_name is not None:
        data["unlabeled_dataset"] = load_data(args.unlabeled_dataset_name)
    elif num_known < len(rows):
        data["unlabeled_dataset"] = rows.select(range(num_known, len(rows)))
    else:
        raise ValueError(
            f"All {len(rows)} rows of {args.dataset_name} are labeled ones, and none is left for the pool; pass "
            "`--unlabeled_dataset_name`, or a lower `--num_labeled`."
        )
    if args.calibration_dataset_name is not None:
        data["calibration_dataset"] = load_data(args.calibration_dataset_name)
    elif args.num_calibration:
        data["calibration_dataset"] = rows.select(range(num_labeled, num_known))
    if args.eval_dataset_name is not None:
        data["eval_dataset"] = load_data(args.eval_dataset_name)
    elif args.dataset_test_split in splits:
        data["eval_dataset"] = splits[args.dataset_test_split]
    return data


def train(train_args: TrainArguments, training_args: SSRMConfig, model_args: ModelConfig) -> None:
    """Train in this process, which may be one of several, and save the model."""
    trainer = make_trainer(train_args, training_args, model_args)
    # Started again after an interruption, it goes on where it was.
    trainer.train(resume_from_checkpoint=trainer.run.has_run)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model: {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=train_args.dataset_name)


def launch(argv: list[str], debug: bool = False) -> int:
    """
    Check the arguments, and train in processes that accelerate starts; a dry run stays in this one.

    Args:
        argv (`list[str]`):
            Arguments of the command and of `accelerate launch`.
        debug (`bool`, *optional*, defaults to `False`):
            Whether an error shows its traceback.

    Returns:
        `int`: exit status.

    Raises:
        ValueError: If an argument can't be used.
        KeyboardInterrupt: If the training was interrupted.
    """
    (train_args, training_args, model_args), rest = make_parser().parse(argv)
    launcher = launch_command_parser()
    launcher.error = _refuse  # type: ignore[method-assign]
    own = [*argv, "--debug"] if debug else argv
    launch_args = launcher.parse_args([*resolve_accelerate_config_argument(rest), "-m", "trl_ssrm.cli.train", *own])
    if launch_args.training_script != "trl_ssrm.cli.train":
        _refuse(f"unrecognized arguments: {' '.join(rest)}")
    if train_args.dry_run:
        trainer = make_trainer(train_args, training_args, model_args)
        print(dry_run(trainer))
        return 0
    if launch_args.num_cpu_threads_per_process is None and not torch.cuda.is_available():
        # Left alone, accelerate gives a process a single thread, which is right beside a GPU.
        threads = max(1, torch.get_num_threads() // (launch_args.num_processes or 1))
        launch_args.num_cpu_threads_per_process = int(os.environ.get("OMP_NUM_THREADS", threads))
    return _launch(launch_args, debug)


def _launch(launch_args: Any, debug: bool) -> int:
    if not debug:
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
        logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.CRITICAL)
    # Ctrl-C reaches the process that trains too; this one waits until that one has ended.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        launch_command(launch_args)
    except subprocess.CalledProcessError as error:
        # The process has said what it had to say.
        return _status(error.returncode)
    except ChildFailedError as error:
        if debug:
            raise
        failure = error.get_first_failure()[1]
        if isinstance(failure.message, dict):
            tell("trl-ssrm train", f"error: {failure.message['message'].removeprefix('ValueError: ')}")
        return _status(failure.exitcode)
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


def _status(code: int) -> int:
    if code in (INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    if code < 0:
        name = signal.Signals(-code).name
        memory = " (the machine may be out of memory)" if code == -signal.SIGKILL else ""
        raise ValueError(f"The training was ended by {name}{memory}; the same command goes on from where it was.")
    return ERROR


def _refuse(message: str) -> None:
    raise ValueError(f"{message}; see `trl-ssrm train --help`, or `accelerate launch --help` for the launcher.")


def _main() -> int:
    """What each process does that accelerate has started."""
    debug, argv = take_debug(sys.argv[1:])
    try:
        # What is left are the arguments of the launcher, which has read them.
        parsed, _ = make_parser().parse(argv)
        train(*parsed)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        if "TORCHELASTIC_ERROR_FILE" not in os.environ:
            tell("trl-ssrm train", f"error: {sentence(error)}")
        else:
            # The launcher tells it once, whichever of the processes has failed first.
            ErrorHandler().record_exception(ValueError(sentence(error)))
        return ERROR
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(_main())
