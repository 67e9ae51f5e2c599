"""Segmentation of large images without holding the logits of all classes at the size of the image."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.structures import BaseDataElement, PixelData
from torch import nn
from torch.nn.functional import interpolate

MAX_LOGITS = 2**27  # maximum number of logits at the size of the image in memory: half a gigabyte


@contextmanager
def labels_alone(model: nn.Module) -> Iterator[None]:
    """Context manager in which a segmentor resizes the logits of large images some classes at a time.

    mmseg resizes the logits of all classes at once: 150 classes of a photo of 12 megapixels take 7 GB. The labels are
    the same; these samples have no `seg_logits`.

    Args:
        model: Segmentor of mmseg.
    """
    postprocess = model.postprocess_result

    def postprocess_result(seg_logits: torch.Tensor, data_samples: list | None = None) -> list:
        if data_samples is None or seg_logits.shape[1] == 1 or not any(_is_large(seg_logits, s) for s in data_samples):
            return postprocess(seg_logits, data_samples)
        for logits, sample in zip(seg_logits, data_samples):
            meta = sample.metainfo
            left, right, top, bottom = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
            logits = logits[:, top : logits.shape[1] - bottom, left : logits.shape[2] - right]
            labels = _resize_and_decide(logits, sample.ori_shape, model.align_corners)
            sample.set_data({'pred_sem_seg': PixelData(data=labels)})
        return data_samples

    model.postprocess_result = postprocess_result
    try:
        yield
    finally:
        del model.postprocess_result  # the method of the class is visible again


def _is_large(seg_logits: torch.Tensor, sample: BaseDataElement) -> bool:
    height, width = sample.ori_shape
    return seg_logits.shape[1] * height * width > MAX_LOGITS and not sample.metainfo.get('flip')


def _resize_and_decide(logits: torch.Tensor, size: tuple[int, int], align_corners: bool) -> torch.Tensor:
    """Return the class (1, H, W) with the largest logit after resizing logits (C, h, w) to a size (H, W)."""
    n = max(MAX_LOGITS // (size[0] * size[1]), 1)
    best, labels = None, None
    for start in range(0, len(logits), n):
        part = interpolate(logits[None, start : start + n], size=size, mode='bilinear', align_corners=align_corners)[0]
        index = part.argmax(0, keepdim=True)
        value = part.gather(0, index)
        del part
        if best is None:
            best, labels = value, index
            continue
        is_larger = value > best
        best = torch.where(is_larger, value, best)
        labels = torch.where(is_larger, index + start, labels)
    return labels
