"""
The experiment of Semi-Supervised Reward Modeling (He et al., arXiv 2409.06903): the pairwise model on shares of the labels,
rounds until the kept pairs no longer change, RewardBench, calibration, and policies trained with the reward models.

    accelerate launch --config_file recipes/accelerate_configs/fsdp2.yaml recipes/paper/paper.py \
        --config recipes/paper/gemma_2b.yaml --steps train
    accelerate launch --config_file recipes/accelerate_configs/fsdp2.yaml recipes/paper/paper.py \
        --config recipes/paper/gemma_2b.yaml --steps policies
    python recipes/paper/paper.py --config recipes/paper/gemma_2b.yaml --steps measure figures

The steps:
- train: for each share of the labels a model with rounds on the other pairs as the pool. Its round 0 is the model of the labels
  alone. Share 1 is all labels, without a pool.
- policies: for each share the models of round 0 and of the last round label completions of the policy's base, and DPO trains a
  policy on them.
- measure: RewardBench of every round of every share, and win rates of the policies over their base, by
  `--judge_name_or_path`, a scalar reward model that was trained on other data.
- figures: a table and four plots of what is measured so far.

Everything that is done is kept in `output_dir`; started again, the script goes on where it was. `--label_fractions 0.25` does
one share, so that several machines can share the work on one file system.
"""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from figures import draw, table
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config, maybe_extract_prompt

from trl_ssrm import (
    PairwiseJudge,
    RoundCallback,
    SSRMConfig,
    SSRMRewardFunction,
    SSRMTrainer,
    evaluate,
    generate_completions,
    label_preferences,
)
from trl_ssrm.cli.errors import running_script
from trl_ssrm.io.files import write_json
from trl_ssrm.io.sources import load_data


STEPS = ("train", "policies", "measure", "figures")


@dataclass
class PaperArguments(ScriptArguments):
    """Arguments of the experiment, beside the arguments of the reward models."""

    steps: list[str] = field(
        default_factory=lambda: list(STEPS), metadata={"help": f"Steps to do: {', '.join(STEPS)}."}
    )
    label_fractions: list[float] = field(
        default_factory=lambda: [1 / 16, 1 / 4, 1.0], metadata={"help": "Shares of the labels; 1 is all of them."}
    )
    num_held_out: int = field(default=2_000, metadata={"help": "Prompts whose pairs are held out, for calibration."})
    max_text_tokens: int = field(default=2_048, metadata={"help": "Pairs with more tokens in all are left out."})
    rewardbench_name: str = field(default="allenai/reward-bench", metadata={"help": "RewardBench: hub ID or file."})
    rewardbench_split: str = field(default="filtered", metadata={"help": "Its split."})
    policy_name_or_path: str | None = field(
        default=None, metadata={"help": "Base of the policies. Default: the model."}
    )
    judge_name_or_path: str | None = field(
        default=None, metadata={"help": "Scalar reward model for the win rates, trained on other data."}
    )
    num_policy_prompts: int = field(default=20_000, metadata={"help": "Prompts that the policies are trained on."})
    num_eval_prompts: int = field(default=500, metadata={"help": "Prompts that the win rates are counted on."})
    num_completions: int = field(default=4, metadata={"help": "Completions of a prompt to learn from."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest completion in tokens."})
    policy_learning_rate: float = field(default=5e-7, metadata={"help": "Learning rate of the policies."})
    policy_num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs of the policies."})


COMPARISON = re.compile(r"\[CONTEXT\] (.*?) \[RESPONSE A\] (.*) \[RESPONSE B\] (.*) \n?", re.DOTALL)
TURN = re.compile(r"\n*<turn> (user|assistant)\n ")


def as_pair(row: dict[str, Any]) -> dict[str, Any]:
    """
    A pair of a row with `chosen` and `rejected` as messages, or of one with `messages`: a comparison in one text and the letter
    of the better response, as RLHFlow's process_pair_data.py makes it.
    """
    nothing: dict[str, Any] = {"prompt": None, "chosen": None, "rejected": None}
    if "messages" not in row:
        row = maybe_extract_prompt({name: row[name] for name in ("prompt", "chosen", "rejected") if name in row})
        return {name: row[name] for name in nothing} if all(map(has_text, row.values())) else nothing
    question, answer = (message["content"] for message in row["messages"])
    parts, letter = COMPARISON.fullmatch(question), answer.strip()
    if parts is None or letter not in ("A", "B"):
        return nothing
    before, *turns = TURN.split(parts[1].removesuffix("\n"))
    prompt = [{"role": role, "content": text} for role, text in zip(turns[::2], turns[1::2], strict=True)]
    # A text that holds a mark itself can't be taken apart.
    if before or [turn["role"] for turn in prompt[::2]] != ["user"] * -(-len(prompt) // 2) or not len(prompt) % 2:
        return nothing
    if question.count("[RESPONSE A]") + question.count("[RESPONSE B]") != 2:
        return nothing
    chosen, rejected = (parts[2], parts[3]) if letter == "A" else (parts[3], parts[2])
    if not all(map(has_text, (prompt, chosen, rejected))):
        return nothing
    of = {"chosen": chosen, "rejected": rejected}
    return {"prompt": prompt, **{name: [{"role": "assistant", "content": text}] for name, text in of.items()}}


def has_text(value: Any) -> bool:
    """Whether a text, or each message, says something."""
    texts = [value] if isinstance(value, str) else [message["content"] for message in value]
    return bool(texts) and all(text and text.strip() for text in texts)


class KeepRounds(RoundCallback):
    """
    Saves the model of each round, for RewardBench and for the policies. That of a round is saved when the next one begins, since
    a run that is killed there comes to this point again; the script saves the last one.
    """

    trainer: SSRMTrainer

    def on_round_begin(self, args, state, control, round, **kwargs):
        if round > 0:
            self.trainer.save_model(str(Path(args.output_dir) / f"model_of_round_{round - 1}"))


class Paper:
    """The steps of the experiment, with the settings that all of them share."""

    def __init__(self, script_args: PaperArguments, training_args: SSRMConfig, model_args: ModelConfig):
        self.script_args, self.training_args, self.model_args = script_args, training_args, model_args
        self.state, self.output_dir = PartialState(), Path(training_args.output_dir)
        self.policy_base = script_args.policy_name_or_path or model_args.model_name_or_path
        loading = {"revision": model_args.model_revision, "attn_implementation": model_args.attn_implementation}
        training_args.model_init_kwargs = {**loading, "dtype": model_args.dtype}
        if unknown := set(script_args.steps) - set(STEPS):
            raise ValueError(f"`steps` has {', '.join(sorted(unknown))}; choose from {', '.join(STEPS)}.")
        if self.state.num_processes > 1 and not set(script_args.steps) <= {"train", "policies"}:
            raise ValueError("Several processes do `--steps train` and `policies`; do the others with `python`.")
        if not all(0 < fraction <= 1 for fraction in script_args.label_fractions):
            raise ValueError(f"`label_fractions` must be above 0 and at most 1, got {script_args.label_fractions}.")
        self.output_dir.mkdir(parents=True, exist_ok=True)

    def split(self) -> tuple[list[Dataset], Dataset]:
        """The pairs of each prompt that may be trained on, in random order, and the held-out pairs."""
        args = self.script_args
        tokenizer = AutoTokenizer.from_pretrained(self.model_args.model_name_or_path)
        with self.state.main_process_first():
            rows = load_data(args.dataset_name, args.dataset_train_split)
            pairs = rows.map(as_pair, remove_columns=rows.column_names, num_proc=self.training_args.dataset_num_proc)

        def is_short(row: dict[str, Any]) -> bool:
            values = [row[name] for name in ("prompt", "chosen", "rejected")]
            texts = [text for v in values for text in ([v] if isinstance(v, str) else [m["content"] for m in v])]
            return sum(len(tokenizer(text, verbose=False)["input_ids"]) for text in texts) <= args.max_text_tokens

        with self.state.main_process_first():
            told = pairs.filter(lambda row: row["prompt"] is not None)
            short = told.filter(is_short, num_proc=self.training_args.dataset_num_proc)
        self.state.print(
            f"{len(rows):,} pairs, {len(rows) - len(told):,} not told apart, {len(told) - len(short):,} longer than "
            f"{args.max_text_tokens} tokens, {len(short):,} used"
        )
        rows_of: dict[str, list[int]] = {}
        for row, prompt in enumerate(short["prompt"]):
            rows_of.setdefault(json.dumps(prompt), []).append(row)
        groups = list(rows_of.values())
        if len(groups) <= args.num_held_out:
            raise ValueError(
                f"`num_held_out` is {args.num_held_out}, but the data has {len(groups)} prompts; lower it."
            )
        order = np.random.default_rng(self.training_args.seed).permutation(len(groups)).tolist()
        held_out = [row for group in order[: args.num_held_out] for row in groups[group]]
        self.groups = [groups[group] for group in order[args.num_held_out :]]
        return short, short.select(held_out)

    def directory(self, fraction: float) -> Path:
        return self.output_dir / f"labels_{fraction:.4f}"

    # ---- Reward models ----

    def train(self) -> None:
        """Train a model for each share of the labels, and keep the facts and the model of each round."""
        pairs, held_out = self.split()
        num_pairs = sum(map(len, self.groups))
        for fraction in self.script_args.label_fractions:
            directory = self.directory(fraction)
            if (directory / "facts.json").is_file():
                continue
            ends = np.cumsum([len(rows) for rows in self.groups])
            num_groups = int(np.searchsorted(ends, fraction * num_pairs)) + 1 if fraction < 1 else len(self.groups)
            parts = self.groups[:num_groups], self.groups[num_groups:]
            labeled, pool = (pairs.select([row for rows in part for row in rows]) for part in parts)
            callbacks = [KeepRounds()] if len(pool) else []
            trainer = SSRMTrainer(
                model=self.model_args.model_name_or_path,
                args=replace(self.training_args, output_dir=str(directory)),
                train_dataset=labeled,
                eval_dataset=held_out,
                unlabeled_dataset=pool if len(pool) else None,
                peft_config=get_peft_config(self.model_args),
                callbacks=callbacks,
            )
            for callback in callbacks:
                callback.trainer = trainer
            trainer.train(resume_from_checkpoint=trainer.run.has_run if callbacks else self.checkpoint(directory))
            last = trainer.round_history[-1]["round"] if callbacks else 0
            trainer.save_model(str(directory / f"model_of_round_{last}"))
            self.state.wait_for_everyone()
            if self.state.is_main_process:
                self.write_facts(directory, fraction, len(labeled), trainer)
            self.state.wait_for_everyone()

    @staticmethod
    def checkpoint(directory: Path) -> str | None:
        """The newest checkpoint that is whole: its state is written last."""
        found = [path.parent for path in directory.glob("checkpoint-*/trainer_state.json")]
        return str(max(found, key=lambda path: int(path.name.split("-")[1]))) if found else None

    def write_facts(self, directory: Path, fraction: float, num_labels: int, trainer: SSRMTrainer) -> None:
        """Write what is known of the rounds of a share into one file, the sign that it is trained."""
        rounds: list[dict[str, Any]] = [{"round": 0}]
        if trainer.has_pool:
            rounds = []
            for facts in trainer.round_history:
                number, curves = facts["round"], trainer.run.read_round(facts["round"])["reliability"]
                labeling = trainer.run.round_dir(number) / "labeling.json"
                histogram = (
                    json.loads(labeling.read_text())["histograms"]["confidence"] if labeling.is_file() else None
                )
                rounds.append({**facts, "reliability": curves["eval"]["before"], "confidence": histogram})
        facts = {"fraction": fraction, "num_labels": num_labels, "rounds": rounds}
        write_json(directory / "facts.json", facts)

    def trained(self) -> list[dict[str, Any]]:
        """Facts of the shares that are trained, from the smallest on."""
        found = [json.loads(path.read_text()) for path in self.output_dir.glob("labels_*/facts.json")]
        return sorted(found, key=lambda facts: facts["fraction"])

    # ---- Policies ----

    def policy_models(self) -> list[tuple[float, int]]:
        """Share and round of the reward models that train a policy: the labels alone, and the last round."""
        return [(f["fraction"], n) for f in self.trained() for n in sorted({0, f["rounds"][-1]["round"]})]

    def prompts(self) -> tuple[Dataset, Dataset]:
        """Prompts to train policies on, which the reward models but that of all labels know from the pool; held-out ones to judge."""
        pairs, held_out = self.split()
        args, last = self.script_args, [rows[0] for rows in self.groups[::-1]]
        once = held_out.select(list({json.dumps(p): n for n, p in enumerate(held_out["prompt"])}.values()))
        train = pairs.select(last[: args.num_policy_prompts]).select_columns("prompt")
        return train, once.select(range(min(args.num_eval_prompts, len(once)))).select_columns("prompt")

    def complete(self, model: str, prompts: Dataset, name: str, num_completions: int) -> Dataset:
        return generate_completions(
            model,
            prompts,
            str(self.output_dir / name),
            num_completions=num_completions,
            max_new_tokens=self.script_args.max_new_tokens,
            batch_size=self.training_args.per_device_train_batch_size,
            dtype=self.model_args.dtype,
            seed=self.training_args.seed,
        )

    def train_policies(self) -> None:
        """Train a policy by DPO on the labels of each of the chosen reward models."""
        prompts, _ = self.prompts()
        completions = self.complete(self.policy_base, prompts, "_completions", self.script_args.num_completions)
        names = ("bf16", "gradient_checkpointing", "seed", "use_cpu", "report_to", "logging_steps", "disable_tqdm")
        names += ("per_device_train_batch_size", "gradient_accumulation_steps", "model_init_kwargs")
        settings = {name: getattr(self.training_args, name) for name in names}
        settings |= {"save_strategy": "no", "learning_rate": self.script_args.policy_learning_rate}
        # The default of TRL cuts prompt and completion to 1,024 tokens.
        settings["max_length"] = self.training_args.max_length
        settings |= {"num_train_epochs": self.script_args.policy_num_train_epochs}
        for fraction, round in self.policy_models():
            directory = self.directory(fraction) / f"policy_of_round_{round}"
            if (directory / "done").is_file():
                continue
            judge = PairwiseJudge(str(self.directory(fraction) / f"model_of_round_{round}"))
            labels = label_preferences(judge, completions, str(directory / "_labels"), seed=self.training_args.seed)
            # Its memory is for the trainer.
            del judge
            trainer = DPOTrainer(
                self.policy_base,
                args=DPOConfig(output_dir=str(directory), **settings),
                train_dataset=labels,
                peft_config=get_peft_config(self.model_args),
            )
            trainer.train()
            trainer.save_model(str(directory))
            self.state.wait_for_everyone()
            if self.state.is_main_process:
                (directory / "done").touch()
            self.state.wait_for_everyone()

    # ---- Measurements ----

    def results(self) -> list[dict[str, Any]]:
        path = self.output_dir / "results.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def keep(self, **result: Any) -> None:
        with (self.output_dir / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(result, flush=True)

    def measure(self) -> None:
        """Measure what is not measured yet, a line in results.jsonl each."""
        by = {"rewardbench": self.script_args.rewardbench_name, "win rate": self.script_args.judge_name_or_path}
        for result in self.results():
            if by[result["what"]] not in (result["by"], None):
                raise ValueError(
                    f"{self.output_dir}/results.jsonl has a {result['what']} by {result['by']}, which can't be compared with one by "
                    f"{by[result['what']]}; pass the same again, or move the file away."
                )
        done = {(result["what"], result["fraction"], result["round"]) for result in self.results()}
        bench = None
        for facts in self.trained():
            for round in facts["rounds"]:
                if ("rewardbench", facts["fraction"], round["round"]) in done:
                    continue
                bench = bench or load_data(self.script_args.rewardbench_name, self.script_args.rewardbench_split)
                model = str(self.directory(facts["fraction"]) / f"model_of_round_{round['round']}")
                metrics = evaluate(model, bench, benchmark="rewardbench", disable_tqdm=True).metrics
                # Without one of its subsets there is no final score.
                score = metrics["all"].get("score", metrics["all"]["accuracy"])
                which = {"fraction": facts["fraction"], "round": round["round"], "by": by["rewardbench"]}
                self.keep(what="rewardbench", value=score, is_whole="score" in metrics["all"], **which)
        policies = [
            (fraction, round)
            for fraction, round in self.policy_models()
            if (self.directory(fraction) / f"policy_of_round_{round}" / "done").is_file()
            and ("win rate", fraction, round) not in done
        ]
        if policies and self.script_args.judge_name_or_path is None:
            raise ValueError(
                "Win rates need a judge: pass `--judge_name_or_path`, a scalar reward model of other data."
            )
        if not policies:
            return
        judge = SSRMRewardFunction(self.script_args.judge_name_or_path)
        _, prompts = self.prompts()
        base = self.rewards(judge, self.complete(self.policy_base, prompts, "_eval_base", 1))
        for fraction, round in policies:
            policy = self.directory(fraction) / f"policy_of_round_{round}"
            own = self.rewards(
                judge, self.complete(str(policy), prompts, f"{policy.relative_to(self.output_dir)}/_eval", 1)
            )
            wins = np.where(own == base, 0.5, own > base)
            error = float(wins.std(ddof=1) / np.sqrt(len(wins)))
            which = {"fraction": fraction, "round": round, "by": by["win rate"]}
            self.keep(what="win rate", value=float(wins.mean()), error=error, **which)

    @staticmethod
    def rewards(judge: SSRMRewardFunction, completed: Dataset) -> np.ndarray:
        """Reward of the completion of each prompt. A completion without text was left out; it loses to any other."""
        found = np.full(len(completed), -np.inf)
        rows = [n for n, texts in enumerate(completed["completions"]) if texts]
        part = completed.select(rows)
        found[rows] = judge.score(part["prompt"], [texts[0] for texts in part["completions"]])
        return found

    def show(self) -> None:
        """Write the table and the figures."""
        trained, results = self.trained(), self.results()
        if not trained:
            raise ValueError(f"Nothing is trained in {self.output_dir} yet; begin with `--steps train`.")
        text = table(trained, results)
        (self.output_dir / "table.md").write_text(text + "\n")
        print(text)
        for path in draw(trained, results, self.output_dir):
            print(f"Figure: {path}")


def main(script_args: PaperArguments, training_args: SSRMConfig, model_args: ModelConfig) -> None:
    paper = Paper(script_args, training_args, model_args)
    steps = {"train": paper.train, "policies": paper.train_policies, "measure": paper.measure, "figures": paper.show}
    for name, step in steps.items():
        if name in script_args.steps:
            step()


if __name__ == "__main__":
    parser = TrlParser((PaperArguments, SSRMConfig, ModelConfig))
    with running_script():
        main(*parser.parse_args_and_config())
