"""mmseg's segmentors with all that their test does, as one graph that holds at every size."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import UsageError
from .preprocessing import Preprocess

MODES = ('whole', 'slide')
MAX_UINT8_CLASSES = 255


class ExportableSegmentor(nn.Module):
    """A segmentor of mmseg from image to labels or logits, for `torch.export` and `torch.onnx.export`.

    Args:
        model: mmseg's EncoderDecoder or one derived from it, as built, not optimized; it is set to evaluation mode.
        raw: Whether images come as `data_preprocessor` returns them, and the result stays at their size.
        logits: Whether to return logits, or labels.

    Raises:
        UsageError: If it is a model or a way of testing that cannot be exported.
    """

    def __init__(self, model: nn.Module, *, raw: bool = False, logits: bool = False):
        super().__init__()
        self.model = model
        self.preprocess = nn.Identity() if raw else Preprocess(model.data_preprocessor)
        self.returns_logits = logits
        test_cfg = model.test_cfg or {}
        self.mode = test_cfg.get('mode', 'whole')
        if self.mode not in MODES:
            raise UsageError(f"test_cfg.mode '{self.mode}' cannot be exported: give one of {', '.join(MODES)}")
        if self.mode == 'slide':
            self.crop_size, self.stride = tuple(test_cfg['crop_size']), tuple(test_cfg['stride'])
        self.eval()

    @property
    def output_names(self) -> list[str]:
        """Names of what `forward` returns."""
        return ['logits' if self.returns_logits else 'segmentation']

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
        height, width = images.shape[2:]
        with exportable_operators():
            inputs = self.preprocess(images).to(next(self.model.parameters()).dtype)
            logits = self._slide(inputs) if self.mode == 'slide' else self._encode_decode(inputs)
            logits = logits.float()[:, :, :height, :width]  # without the padding
            if output_size is not None:
                size = [known_positive(n) for n in output_size.tolist()]
                logits = F.interpolate(logits, size=size, mode='bilinear', align_corners=self.model.align_corners)
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

    def _encode_decode(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes, H, W) of inputs (N, C, H, W)."""
        return self.model.encode_decode(inputs, [dict(img_shape=inputs.shape[2:])] * 1)

    def _slide(self, inputs: torch.Tensor) -> torch.Tensor:
        """The same, as the average of the logits of overlapping windows; all windows run as one batch."""
        n, channels, height, width = inputs.shape
        rows = WindowAxis(height, self.crop_size[0], self.stride[0], inputs.device)
        columns = WindowAxis(width, self.crop_size[1], self.stride[1], inputs.device)
        windows = rows.split(inputs, 2)  # (N, C, window rows, crop height, W)
        windows = columns.split(windows, 4)  # (N, C, window rows, crop height, window columns, crop width)
        windows = windows.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, rows.crop, columns.crop)
        logits = self._encode_decode(windows)
        logits = logits.view(n, rows.count, columns.count, -1, rows.crop, columns.crop)
        logits = logits.permute(0, 3, 1, 4, 2, 5)
        return rows.merge(columns.merge(logits, 4), 2)


def with_unknown_size(images: torch.Tensor) -> torch.Tensor:
    """The same batch in sizes of which a tracer knows nothing, so that it cannot fix what it sees in the example."""
    n, channels, height, width = images.shape
    return images.reshape(unknown(n), channels, unknown(height), unknown(width))


def unknown(n: int) -> int:
    """The same positive number, of which a tracer knows no more than that."""
    return known_positive(torch.full((), n, dtype=torch.int64).item())


def known_positive(n: int) -> int:
    """Tell a tracer that a number is positive."""
    torch._check(n >= 1)
    return n


class WindowAxis:
    """Windows along one side of an image, as mmseg's `slide_inference` places them.

    Args:
        size: Of the image.
        crop: Of a window; smaller images are one window.
        stride: Between windows; the last one is shifted back so that it ends where the image does.
        device: Of the indices.
    """

    def __init__(self, size: int, crop: int, stride: int, device: torch.device):
        self.size, self.crop = size, unknown(torch.sym_min(crop, size))
        self.count = unknown(torch.sym_max(size - crop + stride - 1, 0) // stride + 1)
        self.stride, self.n_covering = stride, -(-crop // stride)  # windows that cover a pixel, at most
        self.starts = (torch.arange(self.count, device=device) * stride).clamp(max=size - self.crop)

    def split(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Cut a side into windows: (..., size, ...) -> (..., count, crop, ...)."""
        index = self.starts[:, None] + torch.arange(self.crop, device=x.device)
        return x.index_select(dim, index.flatten()).unflatten(dim, (self.count, self.crop))

    def merge(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Average what windows have of each pixel: (..., count, crop, ...) -> (..., size, ...).

        A pixel is in some of the regular windows, and perhaps in the last one, which is shifted.
        """
        x = x.flatten(dim, dim + 1)
        pixel = torch.arange(self.size, device=x.device)
        nearest = torch.div(pixel, self.stride, rounding_mode='trunc')
        candidates = [nearest - k for k in reversed(range(self.n_covering))]
        regular = [(i, i * self.stride, (i >= 0) & (i < self.count - 1)) for i in candidates]
        last = torch.full_like(pixel, self.count - 1)
        covering = []
        for window, start, exists in [*regular, (last, self.starts[-1], torch.ones_like(pixel, dtype=torch.bool))]:
            offset = pixel - start
            covers = exists & (offset >= 0) & (offset < self.crop)
            covering.append((torch.where(covers, window * self.crop + offset, 0), covers))
        total = sum(covers.long() for _, covers in covering)
        shape = (-1, *[1] * (x.ndim - dim - 1))
        parts = [x.index_select(dim, index) * (covers / total).to(x.dtype).view(shape) for index, covers in covering]
        return sum(parts[1:], parts[0])


# ---- operators that hold at every size -------------------------------------------------------------------------------


@contextmanager
def exportable_operators() -> Iterator[None]:
    """Context manager in which operators whose export would hold at one size alone run in forms for all sizes."""
    from mmseg.models.utils.wrappers import resize

    defaults = resize.__defaults__
    resize.__defaults__ = (*defaults[:-1], False)  # `warning`: what it asks of sizes would fix them
    try:
        with _AnySize():
            yield
    finally:
        resize.__defaults__ = defaults


def adaptive_avg_pool2d(x: torch.Tensor, output_size: int | tuple[int | None, int | None]) -> torch.Tensor:
    """Replace `F.adaptive_avg_pool2d`: exporters would write a pooling of the size that they see.

    Args:
        x: (N, C, H, W).
        output_size: Height and width of the result, or one number for both; None leaves a side as it is.
    """
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


REPLACEMENTS = {F.adaptive_avg_pool2d: adaptive_avg_pool2d, F.interpolate: interpolate}


class _AnySize(TorchFunctionMode):
    """Replaces functions of torch that exporters fix to the size that they see."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))
