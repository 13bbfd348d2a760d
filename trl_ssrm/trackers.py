"""The report at the end of a run, and its pictures for the trackers that `report_to` names."""

import logging
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from .plots import has_matplotlib, saved_plots
from .report import write_report


logger = logging.getLogger(__name__)


def report_run(output_dir: str, trackers: list[TrainerCallback], step: int) -> None:
    """
    Write the report of a run that is over, and send its plots to the trackers. What goes wrong is logged: the model is
    there, and the report can be written again.

    Args:
        output_dir (`str`):
            Output directory of the run.
        trackers (list of [`~transformers.TrainerCallback`]):
            As in [`log_images`].
        step (`int`):
            Number of steps over all rounds.
    """
    again = f"`trl-ssrm report {output_dir}`"
    if not has_matplotlib():
        logger.warning(f'There is no report without matplotlib: `pip install "trl-ssrm[plots]"`, then {again}.')
        return
    try:
        directory = Path(write_report(output_dir)).parent / "plots"
        log_images(trackers, {f"plots/{path.stem}": path for path in saved_plots(directory).values()}, step)
    except Exception:
        # Whatever it is, it is no reason to lose a run of days.
        logger.warning(f"The run is over, but not all of its report was written. Try {again}.", exc_info=True)


def log_images(trackers: list[TrainerCallback], images: dict[str, Path], step: int) -> None:
    """
    Send images to TensorBoard, Weights & Biases and Trackio, as far as they are among the trackers. Others take none.

    Args:
        trackers (list of [`~transformers.TrainerCallback`]):
            Trackers that are at work: after the first step, and before the end of training.
        images (`dict[str, Path]`):
            PNG files by the name that the tracker shows.
        step (`int`):
            Step over all rounds that they belong to.
    """
    # Private in the callbacks: what `Trainer` logs goes to the same run.
    for tracker in trackers:
        if isinstance(tracker, TensorBoardCallback) and tracker.tb_writer is not None:
            from matplotlib.image import imread

            for name, path in images.items():
                tracker.tb_writer.add_image(name, imread(path), step, dataformats="HWC")
            tracker.tb_writer.flush()
        elif isinstance(tracker, WandbCallback) and tracker._initialized:
            shown = {name: tracker._wandb.Image(str(path)) for name, path in images.items()}
            tracker._wandb.log({**shown, "train/global_step": step})
        elif isinstance(tracker, TrackioCallback) and tracker._initialized:
            shown = {name: tracker._trackio.Image(str(path)) for name, path in images.items()}
            tracker._trackio.log({**shown, "train/global_step": step})
