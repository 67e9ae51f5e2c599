"""Pictures of predictions on images of any number of channels."""

import os
from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..channel_files import ChannelReader, to_rgb


@HOOKS.register_module()
class ChannelVisualizationHook(Hook):
    """Draws predictions of a test, as mmdet's and mmseg's hooks do, onto the first three channels.

    Args:
        draw: whether to draw.
        interval: of the images that are drawn.
        show: whether they are shown in a window.
        wait_time: seconds that each is shown.
        test_out_dir: folder for the pictures.
        reader: arguments of `ChannelReader`.
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
