"""The trackers that `report_to` names: open until the last round is over, and given the pictures of the report then."""

import logging
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    get_reporting_integration_callbacks,
)
from transformers.trainer_callback import CallbackHandler

from .plots import has_matplotlib, saved_plots
from .report import write_report


logger = logging.getLogger(__name__)


class RoundCallbackHandler(CallbackHandler):
    """
    Callback handler that ends a training run once, after the last round.

    `Trainer` tells its callbacks that training has ended at the end of every round. Trackers close their run then, and
    what the next round logs would go to another one.
    """

    def __init__(self, handler: CallbackHandler, report_to: str | list[str] | None):
        super().__init__(
            handler.callbacks, handler.model, handler.processing_class, handler.optimizer, handler.lr_scheduler
        )
        self.trackers = tuple(get_reporting_integration_callbacks(report_to))

    def on_train_end(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> TrainerControl:
        return self._end([c for c in self.callbacks if not isinstance(c, self.trackers)], args, state, control)

    def end_trackers(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> TrainerControl:
        """Close the trackers, after the last round."""
        return self._end(self.open_trackers, args, state, control)

    @property
    def open_trackers(self) -> list[TrainerCallback]:
        """list of [`~transformers.TrainerCallback`]: the trackers, which are at work until the last round is over."""
        return [callback for callback in self.callbacks if isinstance(callback, self.trackers)]

    def _end(self, callbacks: list[TrainerCallback], args, state, control) -> TrainerControl:
        everyone, self.callbacks = self.callbacks, callbacks
        try:
            return super().on_train_end(args, state, control)
        finally:
            self.callbacks = everyone


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
