"""
`trl-ssrm train`: train a reward model from files of labels and a pool without labels.

With arguments for `accelerate launch`, or several accelerators, the command starts this module through accelerate, as
`trl reward` does. Otherwise it trains in its own process.
"""

import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from datasets import Dataset
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ErrorHandler
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback
from trl import ModelConfig, get_peft_config, get_quantization_config
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from .. import PseudoLabelingCallback, SSRMConfig, SSRMTrainer
from ..alignment.labeling import load_labeler
from ..data.prompts import split_by_prompt
from ..io.hub import check_model_is_there
from ..io.shapes import named_columns, with_known_columns
from ..io.sources import load_data, load_splits
from ..models.calibration import load_temperature
from .arguments import TrainingParser
from .dry_run import dry_run
from .errors import ERROR, INTERRUPTED, leave_process_group, sentence, take_debug, tell
from .help import TRAIN_EPILOG, TRAIN_HELP


logger = logging.getLogger(__name__)


@dataclass
class TrainArguments:
    """
    Arguments of `trl-ssrm train`, in addition to the arguments of the trainer and of the model.

    Args:
        dataset_name (`str`, *optional*):
            Labeled pairs: a file, a folder, or the ID of a dataset on the hub, as for [`load_data`].
        dataset_config (`str`, *optional*):
            Configuration of a dataset on the hub.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split with the labeled pairs.
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on, if the dataset has it and `eval_dataset_name` is not set.
        num_labeled (`int`, *optional*):
            Number of rows used with their labels, drawn at random with the seed. If `None`, all rows that
            `num_calibration` leaves.
        num_calibration (`int`, *optional*, defaults to `0`):
            Number of further rows used with their labels, to calibrate the confidence.
        unlabeled_dataset_name (`str`, *optional*):
            Pool. If `None`, the other rows of `dataset_name`, without their labels.
        eval_dataset_name (`str`, *optional*):
            Labeled pairs to evaluate on.
        calibration_dataset_name (`str`, *optional*):
            Labeled pairs to calibrate the confidence, instead of `num_calibration`.
        teacher_model_name_or_path (`str`, *optional*):
            Reward model, scalar or pairwise, that labels the pool in place of the model that is trained.
        prompt_column, chosen_column, rejected_column (`str`, *optional*):
            Columns that stand for `prompt`, `chosen` and `rejected` in all of these datasets. Some usual shapes are known
            without it; see [`~trl_ssrm.io.shapes.with_known_columns`].
        padding_token (`str`, *optional*):
            Padding token. PPO needs one that differs from the end token. If `None`, the tokenizer's own.
        verbose (`bool`, *optional*, defaults to `False`):
            Whether the logs of the steps and of the libraries are shown on the console.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to check data, model and settings, print the cost of each round, and train nothing.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Labeled pairs: hub ID, folder, or file (JSON lines, CSV, TSV, Parquet)."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split with the labeled pairs."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, if `eval_dataset_name` is not set."}
    )
    num_labeled: int | None = field(
        default=None, metadata={"help": "Number of rows used with their labels, drawn with the seed. Default: all."}
    )
    num_calibration: int = field(
        default=0, metadata={"help": "Number of further rows used with their labels, to calibrate the confidence."}
    )
    unlabeled_dataset_name: str | None = field(
        default=None, metadata={"help": "Pool. Default: the other rows of `dataset_name`, without their labels."}
    )
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Labeled pairs to evaluate on."})
    calibration_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Labeled pairs to calibrate the confidence, instead of `num_calibration`."},
    )
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Reward model that labels the pool. Default: the model that is trained."},
    )
    prompt_column: str | None = field(default=None, metadata={"help": "Column with the prompts. Default: prompt."})
    chosen_column: str | None = field(
        default=None, metadata={"help": "Column with the better answers. Default: chosen."}
    )
    rejected_column: str | None = field(
        default=None, metadata={"help": "Column with the worse answers. Default: rejected."}
    )
    padding_token: str | None = field(
        default=None,
        metadata={"help": "Padding token. PPO needs one that differs from the end token. Default: the tokenizer's."},
    )
    verbose: bool = field(
        default=False, metadata={"help": "Show the logs of the steps, and what libraries have to say, on the console."}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Check data, model and settings, print the cost of each round, and train nothing."},
    )


def make_parser(**kwargs: Any) -> TrainingParser:
    """[`TrainingParser`]: parser of the command. Its own arguments come first, then those of the trainer and the model."""
    words = f"{TRAIN_HELP[0].upper()}{TRAIN_HELP[1:]}."
    types = (TrainArguments, SSRMConfig, ModelConfig)
    return TrainingParser(types, prog="trl-ssrm train", description=words, epilog=TRAIN_EPILOG, **kwargs)


def make_trainer(train_args: TrainArguments, training_args: SSRMConfig, model_args: ModelConfig) -> SSRMTrainer:
    """
    Load the data and the model, and check both.

    Args:
        train_args ([`TrainArguments`]):
            Arguments of the command.
        training_args ([`SSRMConfig`]):
            Arguments of the trainer.
        model_args ([`~trl.ModelConfig`]):
            Arguments of the model.

    Returns:
        [`SSRMTrainer`]: a trainer that is ready to train.

    Raises:
        ValueError: If an argument is missing or invalid, or data or model can't be loaded. The message names it.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("Pass `--model_name_or_path`, the model to start from.")
    if train_args.dataset_name is None:
        raise ValueError("Pass `--dataset_name`, the labeled pairs.")
    if train_args.verbose:
        training_args.log_level = "info"
    # The parser has turned text into a dictionary.
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
        tokenizer = _load_tokenizer(train_args.padding_token, training_args, model_args)
    callbacks: list[TrainerCallback] = []
    if (teacher := train_args.teacher_model_name_or_path) is not None:
        labeler = load_labeler(
            teacher, dtype=model_args.dtype, trust_remote_code=bool(training_args.trust_remote_code)
        )
        callbacks.append(PseudoLabelingCallback(teacher=labeler))
    return SSRMTrainer(
        model=str(model_args.model_name_or_path),
        args=training_args,
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        **data,
    )


def _load_tokenizer(padding_token: str, training_args: SSRMConfig, model_args: ModelConfig) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    if padding_token not in tokenizer.get_vocab():
        raise ValueError(
            f"`padding_token` {padding_token!r} is not in the vocabulary of {model_args.model_name_or_path}; pass a token "
            "that is."
        )
    tokenizer.pad_token = padding_token
    return tokenizer


def load_pairs(args: TrainArguments, seed: int) -> dict[str, Dataset]:
    """
    Load the datasets of a run.

    Args:
        args ([`TrainArguments`]):
            Arguments of the command, with `dataset_name`.
        seed (`int`):
            Seed for drawing the rows that are used with their labels.

    Returns:
        `dict[str, Dataset]`: the datasets by the names of the arguments of [`SSRMTrainer`].

    Raises:
        ValueError: If a dataset can't be loaded, has too few rows, or leaves none for the pool.
    """
    assert args.dataset_name is not None
    splits = load_splits(args.dataset_name, args.dataset_config)
    rows = splits.get(args.dataset_train_split)
    if rows is None:
        # Accepts a file, which is one split of any name, and raises for any other dataset.
        rows = load_data(args.dataset_name, args.dataset_train_split, args.dataset_config)
    named = named_columns(args)
    rows = with_known_columns(rows, args.dataset_name, False, named)
    data = _split_rows(rows, args, seed)
    if args.unlabeled_dataset_name is not None:
        pool = load_data(args.unlabeled_dataset_name)
        # A pool may lack the columns of labels.
        own = {target: given if given in pool.column_names else None for target, given in named.items()}
        data["unlabeled_dataset"] = with_known_columns(pool, args.unlabeled_dataset_name, True, own)
    elif "unlabeled_dataset" not in data:
        raise ValueError(
            f"All {len(rows)} rows of {args.dataset_name} are used with their labels, so none is left for the pool; pass "
            "`--unlabeled_dataset_name`, or a lower `--num_labeled`."
        )
    if args.calibration_dataset_name is not None:
        held_out = load_data(args.calibration_dataset_name)
        data["calibration_dataset"] = with_known_columns(held_out, args.calibration_dataset_name, False, named)
    if args.eval_dataset_name is not None:
        held_out = load_data(args.eval_dataset_name)
        data["eval_dataset"] = with_known_columns(held_out, args.eval_dataset_name, False, named)
    elif args.dataset_test_split in splits:
        data["eval_dataset"] = with_known_columns(splits[args.dataset_test_split], args.dataset_name, False, named)
    return data


def _split_rows(rows: Dataset, args: TrainArguments, seed: int) -> dict[str, Dataset]:
    """`dict[str, Dataset]`: the parts of the labeled rows that have any, by the names of [`load_pairs`]."""
    if args.num_calibration and args.calibration_dataset_name is not None:
        raise ValueError("`num_calibration` and `calibration_dataset_name` both calibrate; pass one of them.")
    num_labeled = len(rows) - args.num_calibration if args.num_labeled is None else args.num_labeled
    if num_labeled < 1 or args.num_calibration < 0 or len(rows) < num_labeled + args.num_calibration:
        raise ValueError(
            f"`num_labeled` is {args.num_labeled} and `num_calibration` {args.num_calibration}, but {args.dataset_name} has "
            f"{len(rows)} rows; lower these numbers so that at least one labeled row is left to train on."
        )
    if num_labeled == len(rows):
        return {"train_dataset": rows}
    calibration, labeled, pool = split_by_prompt(rows.shuffle(seed=seed), [args.num_calibration, num_labeled])
    if not len(labeled):
        raise ValueError(
            f"The prompts of the {len(calibration)} rows for `num_calibration` are all that {args.dataset_name} has; lower it."
        )
    parts = {"train_dataset": labeled, "calibration_dataset": calibration, "unlabeled_dataset": pool}
    if len(labeled) + len(calibration) > num_labeled + args.num_calibration:
        sizes = ", ".join(f"{len(part)} in `{name}`" for name, part in parts.items())
        logger.warning(f"Rows of one prompt stay together, so there are {sizes}.")
    return {name: part for name, part in parts.items() if len(part)}


def train(train_args: TrainArguments, training_args: SSRMConfig, model_args: ModelConfig) -> None:
    """Train in this process, which may be one of several, and save the model."""
    trainer = make_trainer(train_args, training_args, model_args)
    # The command says this itself.
    trainer.advice = ""
    labels = str(train_args.dataset_name)
    pool = train_args.unlabeled_dataset_name or labels
    trainer.sources = {**trainer.sources, "labels": labels, "pool": pool}
    # The same command resumes an interrupted run.
    trainer.train(resume_from_checkpoint=trainer.run.has_run)
    trainer.save_model(training_args.output_dir)
    temperature = load_temperature(str(training_args.output_dir)) if trainer.args.should_save else 1.0
    trainer.accelerator.print(f"Model: {training_args.output_dir}, saved with the temperature {temperature:.3f}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=train_args.dataset_name)


def launch(argv: list[str], debug: bool = False) -> int:
    """
    Check the arguments, then train: in this process if it is enough, otherwise in processes that accelerate starts.

    Args:
        argv (`list[str]`):
            Arguments of the command and of `accelerate launch`.
        debug (`bool`, *optional*, defaults to `False`):
            Whether an error shows its traceback.

    Returns:
        `int`: exit status.

    Raises:
        ValueError: If an argument is invalid.
        KeyboardInterrupt: If the training was interrupted.
    """
    parser = make_parser()
    parsed, rest = parser.parse(argv)
    launcher = launch_command_parser()
    launcher.error = lambda message: _refuse(f"{message}{parser.similar(rest)}")  # type: ignore[method-assign]
    own = [*argv, "--debug"] if debug else argv
    launch_args = launcher.parse_args([*resolve_accelerate_config_argument(rest), "-m", "trl_ssrm.cli.train", *own])
    if launch_args.training_script != "trl_ssrm.cli.train":
        _refuse(f"unrecognized arguments: {' '.join(rest)}{parser.similar(rest)}")
    if parsed[0].dry_run:
        print(dry_run(make_trainer(*parsed)))
        return 0
    if not rest and not os.path.isfile(default_config_file) and torch.accelerator.device_count() < 2:
        # accelerate would start one process, and importing TRL there again takes seconds.
        train(*parsed)
        return 0
    if launch_args.num_cpu_threads_per_process is None and not torch.cuda.is_available():
        # The default of accelerate is one thread, which is too few without a GPU.
        threads = max(1, torch.get_num_threads() // (launch_args.num_processes or 1))
        launch_args.num_cpu_threads_per_process = int(os.environ.get("OMP_NUM_THREADS", threads))
    return _launch(launch_args, debug)


def _launch(launch_args: Any, debug: bool) -> int:
    if not debug:
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
        logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.CRITICAL)
    # Ctrl-C also reaches the processes that train. This one has to wait until they have ended.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        launch_command(launch_args)
    except subprocess.CalledProcessError as error:
        # The process has printed its error.
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
        raise ValueError(f"The training was ended by {name}{memory}; run the same command again to resume.")
    return ERROR


def _refuse(message: str) -> None:
    raise ValueError(f"{message}; see `trl-ssrm train --help` and `accelerate launch --help`.")


def _main() -> int:
    """Run one of the processes that accelerate has started, and return its exit status."""
    debug, argv = take_debug(sys.argv[1:])
    try:
        # Unknown arguments are for accelerate, which has read them already.
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
            # The launcher prints the error of the process that failed first.
            ErrorHandler().record_exception(ValueError(sentence(error)))
        return ERROR
    leave_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(_main())
