"""Long work over a dataset, in shards: shared by the processes, resumed where it was, and never whole in memory."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, Features
from tqdm.auto import tqdm

from ..data.formats import TEMPLATE_COLUMNS, in_words, report_dropped
from ..io.files import write_record
from ..io.storage import changed_facts, content_hash, read_facts, rows_hash, storable, write_table


Row = dict[str, Any]


def map_in_shards(
    dataset: Dataset,
    function: Callable[[list[Row], int], tuple[list[Row], Counter[str]]],
    columns: dict[str, Any],
    output_dir: str,
    job: dict[str, Any],
    shard_rows: int,
    desc: str,
    disable_tqdm: bool = False,
) -> Dataset:
    """
    Turn the prompts of a dataset into other rows, shard by shard. The processes take turns with the shards; a shard that is
    on disk is not made again.

    Args:
        dataset ([`~datasets.Dataset`]):
            What to work on.
        function (`Callable[[list[dict], int], tuple[list[dict], Counter[str]]]`):
            Turns the rows of a shard, of which the second argument is the first row, into any number of rows, and
            counts what it left out by reason. Its result may depend on nothing else.
        columns (`dict[str, Any]`):
            Feature types of the columns of the result besides `prompt`, `tools` and `chat_template_kwargs`, which it
            has if the dataset has them.
        output_dir (`str`):
            Directory for the shards, the same for all processes.
        job (`dict[str, Any]`):
            What decides the result besides the rows, as JSON values. A directory with the shards of another job is refused.
        shard_rows (`int`):
            Rows in a shard: what is in memory, and what is lost when the work is interrupted.
        desc (`str`):
            What the work is called on the progress bar.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to leave out the progress bar.

    Returns:
        [`~datasets.Dataset`]: the result, memory-mapped, the same in every process. What was left out is logged.

    Raises:
        ValueError: If `output_dir` holds another job, or if nothing is left.
    """
    shared = [name for name in ("prompt", *TEMPLATE_COLUMNS) if name in dataset.column_names]
    types = {**{name: dataset.features[name] for name in shared}, **columns}
    features = Features({name: storable(feature) for name, feature in types.items()})
    job = {"dataset": rows_hash(dataset), "columns": sorted(features), **job}
    state, root = PartialState(), Path(output_dir)
    if (root / "job.json").is_file() and (changed := changed_facts(root / "job.json", job)):
        raise ValueError(
            f"{output_dir} holds the result of another job: {changed}. Choose another `output_dir`, or delete it."
        )
    # Read by every process before one of them writes it.
    state.wait_for_everyone()
    if state.is_main_process:
        write_record(root / "job.json", job)
    num_shards = -(-len(dataset) // shard_rows)
    paths = [root / f"shard-{number:05d}-of-{num_shards:05d}.parquet" for number in range(num_shards)]
    keys = [f"{content_hash(job)} {path.name}" for path in paths]
    mine = range(state.process_index, num_shards, state.num_processes)
    with tqdm(
        total=sum(min(shard_rows, len(dataset) - number * shard_rows) for number in mine),
        desc=desc,
        unit="row",
        disable=disable_tqdm or not state.is_main_process,
    ) as progress:
        for number in mine:
            start = number * shard_rows
            rows = dataset.select(range(start, min(start + shard_rows, len(dataset))))
            if read_facts(paths[number], keys[number]) is None:
                made, dropped = function(list(rows), start)
                # By columns, since a list without rows would have none.
                table = Dataset.from_dict({name: [row[name] for row in made] for name in features}, features=features)
                own = {"num_rows": len(table), "dropped": dict(dropped)}
                write_table(paths[number], features, [table], own, keys[number])
            progress.update(len(rows))
    state.wait_for_everyone()
    num_rows, dropped = 0, Counter[str]()
    for path, key in zip(paths, keys, strict=True):
        facts = read_facts(path, key)
        if facts is None:
            raise ValueError(f"{path} is missing or damaged; start again, and it is made anew.")
        num_rows += facts["num_rows"]
        dropped.update(facts["dropped"])
    if state.is_main_process:
        report_dropped("dataset", dropped)
    if num_rows == 0:
        raise ValueError(
            f"Nothing of `dataset` is left ({in_words(dropped)}); give it other rows, or relax the settings."
        )
    with state.main_process_first():
        return Dataset.from_parquet([str(path) for path in paths], features=features, cache_dir=str(root / "cache"))
