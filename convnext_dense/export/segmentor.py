"""mmseg's segmentors with all that their test does, as one graph that holds at every size."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..channel_files import ChannelReader
from ..errors import UsageError
from .preprocessing import Preprocess
from .sizes import known_size, unknown, with_unknown_size

MODES = ('whole', 'slide')
MAX_UINT8_CLASSES = 255


class ExportableSegmentor(nn.Module):
    """A segmentor of mmseg from image to labels or logits, for `torch.export` and `torch.onnx.export`.

    Args:
        model: mmseg's EncoderDecoder or one derived from it, optimized or not; it is set to evaluation mode.
        raw: Whether images come as `data_preprocessor` returns them, and the result stays at their size.
        logits: Whether to return logits, or labels.
        reader: As of `Preprocess`.

    Raises:
        UsageError: If it is a model or a way of testing that cannot be exported.
    """

    def __init__(
        self, model: nn.Module, *, raw: bool = False, logits: bool = False, reader: ChannelReader | None = None
    ):
        super().__init__()
        if hasattr(model.decode_head, 'pixel_decoder'):
            from .mask2former import traceable_segmentor  # needs mmdet, as mmseg's head does

            model = traceable_segmentor(model)
        self.model = model
        self.preprocess = nn.Identity() if raw else Preprocess(model.data_preprocessor, reader)
        self.returns_logits, self.output_names = logits, ['logits' if logits else 'segmentation']
        test_cfg = model.test_cfg or {}
        self.mode = test_cfg.get('mode', 'whole')
        if self.mode not in MODES:
            raise UsageError(f"test_cfg.mode '{self.mode}' cannot be exported: give one of {', '.join(MODES)}")
        if self.mode == 'slide':
            self.crop_size, self.stride = tuple(test_cfg['crop_size']), tuple(test_cfg['stride'])
            self.resizes_last = resizes_last(model)
        self.eval()

    def forward(self, images: torch.Tensor, output_size: torch.Tensor | None = None) -> torch.Tensor:
        """Segment a batch of images of one size.

        Args:
            images: (N, C, H, W) as `Preprocess` takes them; with `raw` as the model takes them.
            output_size: Height and width of the result, (2,) of int64; by default those of `images`.

        Returns:
            Labels (N, h, w), uint8 or, of more than 255 classes, int32; or logits (N, classes, h, w) of float32, for a
            single output channel probabilities, as mmseg has them in `seg_logits`.
        """
        images = with_unknown_size(images)
        size = tuple(images.shape[2:])
        if output_size is not None:
            output_size = known_size(output_size)
        with exportable_operators():
            inputs = self.preprocess(images).to(next(self.model.parameters()).dtype)
            logits = (self._slide if self.mode == 'slide' else self._run_whole)(inputs, size, output_size)
        return self._finish(logits)

    def _finish(self, logits: torch.Tensor) -> torch.Tensor:
        if logits.shape[1] == 1:
            logits = logits.sigmoid()
            labels = (logits > self.model.decode_head.threshold)[:, 0]
        elif not self.returns_logits:
            labels = logits.argmax(1)
        if self.returns_logits:
            return logits
        return labels.to(torch.uint8 if logits.shape[1] <= MAX_UINT8_CLASSES else torch.int32)

    def _run_whole(self, inputs: torch.Tensor, size: tuple[int, int], output_size: list[int] | None) -> torch.Tensor:
        """Logits of inputs (N, C, H, W), of which `size` is no padding, resized to `output_size`."""
        logits = self._encode_decode(inputs).float()[:, :, : size[0], : size[1]]
        if output_size is None:
            return logits
        return F.interpolate(logits, size=output_size, mode='bilinear', align_corners=self.model.align_corners)

    def _encode_decode(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model.encode_decode(inputs, [dict(img_shape=inputs.shape[2:])])

    def _slide(self, inputs: torch.Tensor, size: tuple[int, int], output_size: list[int] | None) -> torch.Tensor:
        """The same, as the average of the logits of overlapping windows.

        All windows run as one batch. What follows is linear along each side: to resize the logits of the windows, to
        average them and to resize the average is one product with a matrix per side.
        """
        n, channels, *input_size = inputs.shape
        rows, columns = (WindowAxis(*args, inputs.device) for args in zip(input_size, self.crop_size, self.stride))
        windows = columns.split(
            rows.split(inputs, 2), 4
        )  # (N, C, window rows, crop height, window columns, crop width)
        windows = windows.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, rows.crop, columns.crop)
        logits = (self._decode if self.resizes_last else self._encode_decode)(windows).float()
        classes, *map_size = logits.shape[1:]
        logits = logits.view(n, rows.count, columns.count, classes, *map_size).permute(0, 3, 1, 4, 2, 5)
        logits = logits.reshape(n, classes, rows.count * map_size[0], columns.count * map_size[1])
        merge_rows, merge_columns = (
            axis.merging_matrix(cells, visible, output, self.model.align_corners)
            for axis, cells, visible, output in zip((rows, columns), map_size, size, output_size or (None, None))
        )
        return merge_rows @ (logits @ merge_columns.T)

    def _decode(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits as the head computes them, before it resizes them to the size of the input."""
        return self.model.decode_head(self.model.extract_feat(inputs))


def resizes_last(model: nn.Module) -> bool:
    """Whether all that a segmentor does after its head is to resize the logits to the size of the input."""
    from mmseg.models import EncoderDecoder
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    head = type(model.decode_head)
    methods = type(model).encode_decode, getattr(head, 'predict', None), getattr(head, 'predict_by_feat', None)
    return methods == (EncoderDecoder.encode_decode, BaseDecodeHead.predict, BaseDecodeHead.predict_by_feat)


class WindowAxis:
    """Windows along one side of an image, as mmseg's `slide_inference` places them.

    Args:
        size: Of the image.
        crop: Of a window; smaller images are one window.
        stride: Between windows; the last one is shifted back so that it ends where the image does.
        device: Of the indices.
    """

    def __init__(self, size: int, crop: int, stride: int, device: torch.device):
        self.crop = unknown(torch.sym_min(crop, size))
        self.count = unknown(torch.sym_max(size - crop + stride - 1, 0) // stride + 1)
        self.starts = (torch.arange(self.count, device=device) * stride).clamp(max=size - self.crop)

    def split(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Cut a side into windows: (..., size, ...) -> (..., count, crop, ...)."""
        index = self.starts[:, None] + torch.arange(self.crop, device=x.device)
        return x.index_select(dim, index.flatten()).unflatten(dim, (self.count, self.crop))

    def merging_matrix(self, cells: int, size: int, output_size: int | None, align_corners: bool) -> torch.Tensor:
        """Weights by which the maps of all windows become the side of the result.

        Args:
            cells: Of the map of a window.
            size: Of the image without padding.
            output_size: Of the result; None for `size`.
            align_corners: Of the two resizings, from map to window and from image to result.

        Returns:
            (output_size, count * cells).
        """
        offset = torch.arange(size, device=self.starts.device)[:, None] - self.starts  # of each pixel in each window
        is_inside = (offset >= 0) & (offset < self.crop)
        weights = bilinear_weights(offset, self.crop, cells, align_corners)
        weights = weights * (is_inside / is_inside.sum(1, keepdim=True))[..., None]
        weights = weights.reshape(size, self.count * cells)
        if output_size is None:
            return weights
        pixel = torch.arange(output_size, device=self.starts.device)
        return bilinear_weights(pixel, output_size, size, align_corners) @ weights


def bilinear_weights(pixel: torch.Tensor, size: int, cells: int, align_corners: bool) -> torch.Tensor:
    """Weights (..., cells) of the cells of a map, for pixels (...) of the map resized to a size along one side."""
    if align_corners:
        position = pixel * ((cells - 1) / torch.sym_max(size - 1, 1))
    else:
        position = (pixel + 0.5) * (cells / size) - 0.5
    position = position.clamp(min=0).clamp(max=cells - 1)
    return (1 - (position[..., None] - torch.arange(cells, device=pixel.device)).abs()).clamp(min=0)


# ---- operators that hold at every size -------------------------------------------------------------------------------


@contextmanager
def exportable_operators() -> Iterator[None]:
    """Context manager that replaces operators whose export would hold at one size alone by ones for all sizes."""
    from mmseg.models.utils.wrappers import Upsample, resize

    defaults, upsample = resize.__defaults__, Upsample.forward
    resize.__defaults__ = (*defaults[:-1], False)  # `warning`: what it asks of sizes would fix them
    Upsample.forward = upsample_by_integer
    try:
        with _AnySize():
            yield
    finally:
        resize.__defaults__, Upsample.forward = defaults, upsample


def adaptive_avg_pool2d(x: torch.Tensor, output_size: int | tuple[int | None, int | None]) -> torch.Tensor:
    """Replace `F.adaptive_avg_pool2d`: exporters would write a pooling of the size that they see."""
    rows, columns = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    if columns is not None:
        x = x.mean(3, keepdim=True) if columns == 1 else x @ averaging_weights(x.shape[3], columns, x).T
    if rows is not None:
        x = x.mean(2, keepdim=True) if rows == 1 else averaging_weights(x.shape[2], rows, x) @ x
    return x


def averaging_weights(size: int, cells: int, like: torch.Tensor) -> torch.Tensor:
    """Weights (cells, size) that average the pixels of each cell of an adaptive pooling; cells may overlap."""
    cell = torch.arange(cells, device=like.device)[:, None]
    start = torch.div(cell * size, cells, rounding_mode='trunc')
    end = torch.div((cell + 1) * size + cells - 1, cells, rounding_mode='trunc')
    pixel = torch.arange(size, device=like.device)
    covers = (pixel >= start) & (pixel < end)
    return (covers / (end - start)).to(like.dtype)


def interpolate(x: torch.Tensor, size=None, scale_factor=None, mode='nearest', align_corners=None, *args, **kwargs):
    """Replace `F.interpolate`: with aligned corners a tracer has to know that a side is longer than a pixel."""
    if align_corners and size is not None:
        for n in size:
            if isinstance(n, torch.SymInt):
                torch._check(n > 1)
    return F.interpolate(x, size, scale_factor, mode, align_corners, *args, **kwargs)


def upsample_by_integer(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Replace `forward` of mmseg's `Upsample`, which makes integers of products of sizes and floats."""
    factor = module.scale_factor
    if module.size or isinstance(factor, tuple) or factor != int(factor):
        raise UsageError(f'mmseg.Upsample with size={module.size}, scale_factor={factor} cannot be exported')
    size = [n * int(factor) for n in x.shape[2:]]
    return F.interpolate(x, size, mode=module.mode, align_corners=module.align_corners)


REPLACEMENTS = {F.adaptive_avg_pool2d: adaptive_avg_pool2d, F.interpolate: interpolate}


class _AnySize(TorchFunctionMode):
    """Replaces functions of torch that exporters fix to the size that they see."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))
