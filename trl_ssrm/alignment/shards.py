"""Long work on a dataset, done in shards that processes share and that an interruption does not undo."""

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
MapRows = Callable[[list[Row], int], tuple[list[Row], Counter[str]]]


def map_in_shards(
    dataset: Dataset,
    function: MapRows,
    columns: dict[str, Any],
    output_dir: str,
    job: dict[str, Any],
    shard_rows: int,
    desc: str,
    disable_tqdm: bool = False,
) -> Dataset:
    """
    Turn rows with prompts into other rows, shard by shard. The processes take turns with the shards. A shard that is
    on disk is not made again.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt`.
        function (`Callable[[list[dict], int], tuple[list[dict], Counter[str]]]`):
            Takes the rows of a shard and the number of the first one. Returns any number of new rows, and counts of
            dropped items by reason. Its result may depend only on its arguments and on `job`.
        columns (`dict[str, Any]`):
            Feature types of the new columns. `prompt`, `tools` and `chat_template_kwargs` are taken over from the
            dataset and need no entry.
        output_dir (`str`):
            Directory for the shards, the same for all processes.
        job (`dict[str, Any]`):
            JSON values that, with the rows, decide the result. A directory with shards of another job is refused.
        shard_rows (`int`):
            Rows in a shard. So many are in memory at a time, and so many are done again after an interruption.
        desc (`str`):
            Label of the progress bar.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to hide the progress bar.

    Returns:
        [`~datasets.Dataset`]: the result, memory-mapped, the same in every process. The counts of dropped items are
        logged.

    Raises:
        ValueError: If `output_dir` holds another job, or if no row is left.
    """
    shared = [name for name in ("prompt", *TEMPLATE_COLUMNS) if name in dataset.column_names]
    types = {**{name: dataset.features[name] for name in shared}, **columns}
    features = Features({name: storable(feature) for name, feature in types.items()})
    job = {"dataset": rows_hash(dataset), "columns": sorted(features), **job}
    root, num_shards = Path(output_dir), -(-len(dataset) // shard_rows)
    _claim(root, job)
    paths = [root / f"shard-{number:05d}-of-{num_shards:05d}.parquet" for number in range(num_shards)]
    keys = [f"{content_hash(job)} {path.name}" for path in paths]
    _make_shards(dataset, function, features, paths, keys, shard_rows, desc, disable_tqdm)
    num_rows, dropped = _counts(paths, keys)
    if PartialState().is_main_process:
        report_dropped("dataset", dropped)
    if num_rows == 0:
        raise ValueError(
            f"Nothing of `dataset` is left ({in_words(dropped)}); give it other rows, or relax the settings."
        )
    with PartialState().main_process_first():
        return Dataset.from_parquet([str(path) for path in paths], features=features, cache_dir=str(root / "cache"))


def _claim(root: Path, job: dict[str, Any]) -> None:
    """Write down the job of a directory; refuse a directory with another job."""
    state, path = PartialState(), root / "job.json"
    if path.is_file() and (changed := changed_facts(path, job)):
        raise ValueError(
            f"{root} holds the result of another job: {changed}. Choose another `output_dir`, or delete this one."
        )
    # Every process reads the file before one of them writes it.
    state.wait_for_everyone()
    if state.is_main_process:
        write_record(path, job)


def _make_shards(
    dataset: Dataset,
    function: MapRows,
    features: Features,
    paths: list[Path],
    keys: list[str],
    shard_rows: int,
    desc: str,
    disable_tqdm: bool,
) -> None:
    """Make those shards of this process that are missing, and wait until the other processes have made theirs."""
    state = PartialState()
    starts = range(0, len(dataset), shard_rows)
    own = list(zip(starts, paths, keys, strict=True))[state.process_index :: state.num_processes]
    with tqdm(
        total=sum(min(shard_rows, len(dataset) - start) for start, _, _ in own),
        desc=desc,
        unit="row",
        disable=disable_tqdm or not state.is_main_process,
    ) as progress:
        for start, path, key in own:
            rows = dataset.select(range(start, min(start + shard_rows, len(dataset))))
            if read_facts(path, key) is None:
                made, dropped = function(list(rows), start)
                # `Dataset.from_list` of no rows would have no columns.
                table = Dataset.from_dict({name: [row[name] for row in made] for name in features}, features=features)
                write_table(path, features, [table], {"num_rows": len(table), "dropped": dict(dropped)}, key)
            progress.update(len(rows))
    state.wait_for_everyone()


def _counts(paths: list[Path], keys: list[str]) -> tuple[int, Counter[str]]:
    """Number of rows in all shards, and number of dropped items by reason."""
    num_rows, dropped = 0, Counter[str]()
    for path, key in zip(paths, keys, strict=True):
        facts = read_facts(path, key)
        if facts is None:
            raise ValueError(f"{path} is missing or damaged; start again to make it anew.")
        num_rows += facts["num_rows"]
        dropped.update(facts["dropped"])
    return num_rows, dropped
