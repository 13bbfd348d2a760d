"""
The fault campaign: runs of three rounds that are killed, that find no room on the disk, or whose files are damaged, at
places drawn from a seed. Each is resumed until it ends, and compared with the run that was left alone, bit for bit.

```bash
python -m tests.faults.campaign --num_kills 50 --num_full_disks 20 --num_damages 50
```

or, with an environment of its own, `make faults`.

A kill is SIGKILL, SIGTERM or SIGINT, in training, scoring, selection, saving, writing or at any time; every fourth run is
killed once more when it is resumed. A full disk fails a write and all that come after it. Damage is a flipped byte, a file
cut short, emptied, or taken from another run, in a run that was killed somewhere; it has to lead to the same result, or to
one sentence of our own that names the file. The setups are full training, LoRA with the pool as a stream, and folds, in one
and in two processes. Prints a table, and the seeds of what did not survive. About two seconds a fault on two cores.
"""

import argparse
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.harness import COMPARED, PLACES, SETUPS, SIGNALS, Fault, Outcome, make_models, run  # noqa: E402


# Seconds within which all processes have to be gone after a signal that asks for it. Two of them wait for each other, and
# the one that is left learns of it from its connection.
LEAVES_WITHIN = 3.0
ADVICE = "Go on with `train(resume_from_checkpoint=True)`"


@dataclass
class Trial:
    """What was tried, and what came of it: `"same"`, `"refused"`, or what is wrong."""

    kind: str
    place: str
    outcome: str
    detail: str = ""


class Campaign:
    """
    Args:
        directory (`Path`):
            Where the runs are.
        seed (`int`):
            What the faults are drawn from, with their number.
        setups (`list[tuple[str, int]]`):
            Names of [`SETUPS`] with numbers of processes.
    """

    def __init__(self, directory: Path, seed: int, setups: list[tuple[str, int]]):
        self.directory, self.seed, self.setups = directory, seed, setups
        model = make_models(directory / "model")
        self.expected: dict[tuple[str, int], Outcome] = {}
        self.settings: dict[tuple[str, int], dict[str, Any]] = {}
        for name, num_processes in setups:
            setup = name, num_processes
            self.settings[setup] = {"model": model, "num_processes": num_processes, **SETUPS[name]}
            self.expected[setup] = run(directory / f"alone-{name}-{num_processes}", **self.settings[setup])
            if self.expected[setup].result is None:
                raise RuntimeError(f"The run that was left alone failed:\n{self.expected[setup].log[-3000:]}")
            assert len(self.expected[setup].result["facts"]) == 3

    def draw_fault(self, draw: random.Random, number: int, setup: tuple[str, int], kinds: tuple[str, ...]) -> Fault:
        """A fault at a place that the run that was left alone has reached."""
        places, process = self.expected[setup].places, draw.randrange(setup[1])
        possible = PLACES if kinds == SIGNALS else PLACES[1:]
        if process > 0:
            # It writes little besides.
            possible = ("training", "scoring") if kinds == SIGNALS else ("scoring",)
        elif kinds == SIGNALS:
            possible = (*possible, "time")
        # Each place and each kind in turn, so that a few faults reach them all.
        place, kind = possible[number % len(possible)], kinds[(number + number // len(possible)) % len(kinds)]
        if place == "time":
            return Fault(kind, place, draw.uniform(0, self.expected[setup].seconds), process)
        share = 1 if process == 0 else 0.5
        return Fault(kind, place, draw.randrange(max(1, int(places[place] * share))), process)

    def go_on(self, output_dir: Path, setup: tuple[str, int], fault: Fault = Fault()) -> Outcome:  # noqa: B008
        """Start a run, or resume the one that is there."""
        has_run = (output_dir / "_rounds" / "run.json").exists()
        return run(output_dir, fault, resume=has_run, **self.settings[setup])

    def wrong_with(self, outcome: Outcome, output_dir: Path, setup: tuple[str, int]) -> str:
        """What is different from the run that was left alone; empty if nothing is."""
        if outcome.result is None:
            return f"did not end: {outcome.statuses} {outcome.log[-1500:]}"
        expected = self.expected[setup].result
        assert expected is not None
        different = [name for name in COMPARED if outcome.result[name] != expected[name]]
        if different:
            return f"other {', '.join(different)}"
        left = [path.name for path in output_dir.rglob(".*") if re.search(r"\.\d+$", path.name)]
        return f"left behind: {left}" if left else ""

    def kill(self, number: int) -> Trial:
        """Kill a run, resume it, perhaps kill it again, and let it end."""
        draw = random.Random(f"{self.seed} kill {number}")
        setup = draw.choice(self.setups)
        output_dir = self.directory / f"kill-{number}"
        fault = self.draw_fault(draw, number, setup, SIGNALS)
        killed = self.go_on(output_dir, setup, fault)
        trial = Trial(f"{fault.kind} {setup[0]}, {setup[1]} process{'es' * (setup[1] > 1)}", fault.place, "same")
        trial.detail = f"{fault} in {setup}"
        if killed.result is None and (wrong := self.wrong_in_leaving(killed, fault, output_dir)):
            return replace(trial, outcome=wrong)
        if draw.random() < 0.25:
            self.go_on(output_dir, setup, self.draw_fault(draw, number + 7, setup, SIGNALS))
        resumed = self.go_on(output_dir, setup)
        trial.outcome = self.wrong_with(resumed, output_dir, setup) or "same"
        shutil.rmtree(output_dir)
        return trial

    @staticmethod
    def wrong_in_leaving(killed: Outcome, fault: Fault, output_dir: Path) -> str:
        """Whether a run that was told to end took its time, or did not say how to go on."""
        if fault.kind == "SIGKILL" or killed.seconds_to_leave is None:
            return ""
        if killed.seconds_to_leave > LEAVES_WITHIN:
            return f"took {killed.seconds_to_leave:.1f} s to leave"
        # Before there is a run, there is nothing to go on with; at the moment of its first file, either is right.
        began = (output_dir / "_rounds" / "initial.safetensors").exists() and (fault.place, fault.number) != (
            "time",
            0,
        )
        if began and killed.log.count(ADVICE) != 1 and "RESULT" not in killed.log:
            return f"did not say how to go on: {killed.log[-1500:]}"
        return ""

    def fill_disk(self, number: int) -> Trial:
        """Let the writes of a run fail from some place on, and resume it when there is room again."""
        draw = random.Random(f"{self.seed} full disk {number}")
        setup = draw.choice(self.setups)
        output_dir = self.directory / f"disk-{number}"
        fault = self.draw_fault(draw, number, setup, ("no_space",))
        failed = self.go_on(output_dir, setup, fault)
        trial = Trial(f"no space {setup[0]}, {setup[1]} process{'es' * (setup[1] > 1)}", fault.place, "same")
        trial.detail = f"{fault} in {setup}"
        if failed.result is None and not is_refused(failed, output_dir):
            return replace(trial, outcome=f"no sentence: {failed.log[-1500:]}")
        resumed = self.go_on(output_dir, setup)
        trial.outcome = self.wrong_with(resumed, output_dir, setup) or "same"
        shutil.rmtree(output_dir)
        return trial

    def damage(self, number: int) -> Trial:
        """Damage a file of a run that was killed somewhere, or is over, and resume it."""
        draw = random.Random(f"{self.seed} damage {number}")
        # What two processes read is what one reads.
        setup = draw.choice([each for each in self.setups if each[1] == 1])
        output_dir = self.directory / f"damage-{number}"
        place = draw.choice(PLACES)
        at = draw.randrange(self.expected[setup].places[place] // 2, self.expected[setup].places[place] + 1)
        self.go_on(output_dir, setup, Fault("SIGKILL", place, at))
        files = sorted(
            path
            for path in (output_dir / "_rounds").rglob("*")
            if path.is_file()
            and path.name != "lock"
            and not path.name.startswith(".")
            and path.stat().st_size
            # Of `datasets`, which has them elsewhere for what is no stream.
            and not path.name.startswith(("cache-", "tmp"))
        )
        # A kind of file first, or most would be shards.
        kinds = sorted({kind_of(path, output_dir) for path in files})
        kind = draw.choice(kinds)
        path = draw.choice([each for each in files if kind_of(each, output_dir) == kind])
        how = draw.choice(["flipped byte", "cut short", "emptied", "of another run or place"])
        content = path.read_bytes()
        if how == "of another run or place":
            others = [each for each in self.others(setup).rglob(path.name) if each.read_bytes() != content]
            if not others:
                how = "emptied"
            else:
                # The sidecar of a table goes with it.
                other = draw.choice(others)
                path.write_bytes(other.read_bytes())
                if path.suffix == ".parquet":
                    shutil.copyfile(other.with_suffix(".json"), path.with_suffix(".json"))
        if how == "flipped byte":
            at = draw.randrange(len(content))
            path.write_bytes(content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :])
        elif how in ("cut short", "emptied"):
            path.write_bytes(content[: 0 if how == "emptied" else draw.randrange(len(content))])
        resumed = self.go_on(output_dir, setup)
        trial = Trial(f"{how}", kind, "same", f"{path.relative_to(output_dir)} at {place} in {setup}")
        if resumed.result is not None:
            trial.outcome = self.wrong_with(resumed, output_dir, setup) or "same"
        elif is_refused(resumed, output_dir):
            trial.outcome = "refused"
        else:
            trial.outcome = f"foreign traceback: {resumed.log[-1500:]}"
        shutil.rmtree(output_dir)
        return trial

    def others(self, setup: tuple[str, int]) -> Path:
        """Directory of another run: the same, with another learning rate, killed late so that it has every kind of file."""
        output_dir = self.directory / f"other-{setup[0]}"
        if not output_dir.exists():
            last = self.expected[setup].places["writing"] - 6
            settings = {**self.settings[setup], "learning_rate": 2e-3}
            run(output_dir, Fault("SIGKILL", "writing", last), **settings)
        return output_dir


def kind_of(path: Path, output_dir: Path) -> str:
    """Kind of a file of a run: its place without the numbers."""
    place = re.sub(r"/[0-9a-f]{16}/", "/…/", str(path.relative_to(output_dir / "_rounds")))
    place = re.sub(r"\d+", "N", place).replace("shard-N-of-N", "shard")
    return place.rpartition("/")[0] if "checkpoint-" in place else place


def is_refused(outcome: Outcome, output_dir: Path) -> bool:
    """Whether a process ended with one sentence of our own that names a place in the directory of the run."""
    for log in outcome.logs:
        errors = list(re.finditer(r"^([\w.]*(?:Error|Exception|Interrupt|Exit)\b.*)$", log, re.MULTILINE))
        frames = re.findall(r'File "([^"]+)"', log[: errors[-1].start()]) if errors else []
        is_own = errors and errors[-1][1].startswith(("ValueError: ", "trl_ssrm.io.files.WriteError: "))
        if is_own and str(output_dir) in errors[-1][1] and "/trl_ssrm/" in frames[-1]:
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_kills", type=int, default=50)
    parser.add_argument("--num_full_disks", type=int, default=20)
    parser.add_argument("--num_damages", type=int, default=50)
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first fault, to go on where another call ended"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--setups",
        nargs="+",
        default=[f"{name}-{number}" for number in (1, 2) for name in SETUPS],
        help="names of setups, `-`, and numbers of processes",
    )
    parser.add_argument("--max_seconds", type=float, help="seconds after which no more faults are tried")
    args, start = parser.parse_args(), time.monotonic()
    setups = [(each.split("-")[0], int(each.split("-")[1])) for each in args.setups]
    with tempfile.TemporaryDirectory() as directory:
        campaign = Campaign(Path(directory), args.seed, setups)
        numbers = {"kill": args.num_kills, "fill_disk": args.num_full_disks, "damage": args.num_damages}
        trials = []
        for name, count in numbers.items():
            for number in range(args.first, args.first + count):
                if args.max_seconds is None or time.monotonic() - start < args.max_seconds:
                    trials.append(getattr(campaign, name)(number))
                    each = trials[-1]
                    print(f"{name} {number}: {each.kind}, {each.place}, {each.detail}: {each.outcome}", flush=True)
    table = Counter((trial.kind, trial.place) for trial in trials)
    survived = Counter((each.kind, each.place, each.outcome) for each in trials if each.outcome in ("same", "refused"))
    print("| Fault | Place | Tried | Same result | Refused with a sentence |\n|---|---|---:|---:|---:|")
    for (kind, place), tried in sorted(table.items()):
        print(f"| {kind} | {place} | {tried} | {survived[kind, place, 'same']} | {survived[kind, place, 'refused']} |")
    failed = [trial for trial in trials if trial.outcome not in ("same", "refused")]
    print(f"{len(trials)} faults, {len(trials) - len(failed)} survived.")
    for trial in failed:
        print(f"FAILED: {trial.kind}, {trial.place}: {trial.detail}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
