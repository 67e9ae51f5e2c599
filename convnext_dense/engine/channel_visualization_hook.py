"""Visualization of predictions on images with any number of channels."""

import os
from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..channel_files import ChannelReader, to_rgb


@HOOKS.register_module()
class ChannelVisualizationHook(Hook):
    """Draws the predictions of a test onto the first three channels, as mmdet's and mmseg's hooks do for RGB.

    Args:
        reader: Arguments of `ChannelReader`.
        draw: Whether to draw.
        interval: Draw every `interval`-th image.
        show: Whether to show the images in a window.
        wait_time: Seconds for which each image is shown.
        test_out_dir: Folder for the images; None for no files.
    """

    def __init__(
        self,
        reader: dict,
        draw: bool = False,
        interval: int = 1,
        show: bool = False,
        wait_time: float = 0.0,
        test_out_dir: str | None = None,
    ):
        self.reader, self.draw, self.interval = ChannelReader(**reader), draw, interval
        self.show, self.wait_time, self.test_out_dir = show, wait_time, test_out_dir
        self.num_seen = 0

    def after_test_iter(self, runner, batch_idx: int, data_batch: dict, outputs: Sequence) -> None:
        """Draw the images of a batch."""
        for sample in outputs if self.draw else ():
            self.num_seen += 1
            if (self.num_seen - 1) % self.interval:
                continue
            name = os.path.splitext(os.path.basename(sample.img_path))[0]
            file = self.test_out_dir and os.path.join(self.test_out_dir, f'{name}.png')
            runner.visualizer.add_datasample(
                name,
                to_rgb(self.reader.read(sample.img_path)),
                sample,
                show=self.show,
                wait_time=self.wait_time,
                out_file=file,
                step=self.num_seen,
            )
