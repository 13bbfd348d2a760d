"""The trackers that `report_to` names: they stay open until the last round has ended, and get the plots of the report."""

import logging
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from .plots import has_matplotlib, saved_plots
from .report import write_report


logger = logging.getLogger(__name__)


def report_run(output_dir: str, trackers: list[TrainerCallback], step: int) -> None:
    """
    Write the report of a finished run, and send its plots to the trackers. An error is logged and not raised.

    Args:
        output_dir (`str`):
            Output directory of the run.
        trackers (list of [`~transformers.TrainerCallback`]):
            Open trackers, as in [`log_images`].
        step (`int`):
            Number of optimizer steps over all rounds.
    """
    command = f"`trl-ssrm report {output_dir}`"
    if not has_matplotlib():
        logger.warning(
            "No report was written, because matplotlib is not installed. Run `pip install matplotlib`, then "
            f"{command}."
        )
        return
    try:
        directory = Path(write_report(output_dir)).parent / "plots"
        log_images(trackers, {f"plots/{path.stem}": path for path in saved_plots(directory).values()}, step)
    except Exception:
        # Training may have taken days: no error in the report may end the process before the model is saved.
        logger.warning(f"Training is finished, but writing its report failed. Try {command}.", exc_info=True)


def log_images(trackers: list[TrainerCallback], images: dict[str, Path], step: int) -> None:
    """
    Send images to the trackers. Only TensorBoard, Weights & Biases and Trackio take images; others are skipped.

    Args:
        trackers (list of [`~transformers.TrainerCallback`]):
            Open trackers, after the first training step.
        images (`dict[str, Path]`):
            PNG files by the name that the tracker shows.
        step (`int`):
            Optimizer step, counted over all rounds, to log the images at.
    """
    # The attributes are private, but only through them do the images get into the run that `Trainer` logs to.
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
