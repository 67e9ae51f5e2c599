"""The paper's multi-scale test for segmentation, as test-time augmentation of mmengine."""

import torch
from mmengine.model import BaseTTAModel
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from torch.nn.functional import interpolate

ROWS_PER_STRIP = 8  # rows of the image that are resized and added up at a time


@MODELS.register_module()
class MultiScaleSegmentor(BaseTTAModel):
    """A segmentor tested on many views of each image. `data` of `test_step` holds, for each view, a batch."""

    @torch.no_grad()
    def test_step(self, data: dict) -> list:
        """The data samples of the first view, with `pred_sem_seg` (1 x H x W at the image's own size) of all."""
        samples, probabilities = self.probabilities(data)
        for sample, p in zip(samples, probabilities):
            found = p.argmax(0, keepdim=True) if len(p) > 1 else (p > self.module.decode_head.threshold).to(p)
            sample.set_data({'pred_sem_seg': PixelData(data=found)})
        return samples

    def probabilities(self, data: dict) -> tuple[list, list[torch.Tensor]]:
        """The data samples of the first view, and the views' mean softmax, C x H x W at each image's own size."""
        views = [dict(zip(data, view)) for view in zip(*data.values())]
        first, totals = None, []
        for view in views:
            view = self.module.data_preprocessor(view, False)
            samples = view['data_samples']
            logits = self.module.inference(view['inputs'], [sample.metainfo for sample in samples])
            if first is None:
                first = samples
                totals = [logits.new_zeros(logits.shape[1], *sample.ori_shape) for sample in samples]
            for total, one, sample in zip(totals, logits, samples):
                self._add(total, _undo_pad_and_flip(one, sample.metainfo))
        return first, [total.div_(len(views)) for total in totals]

    def merge_preds(self, data_samples_list):
        raise NotImplementedError('views are added up as they come, in test_step')

    def _add(self, total: torch.Tensor, logits: torch.Tensor) -> None:
        for top in range(0, total.shape[1], ROWS_PER_STRIP):
            strip = total[:, top : top + ROWS_PER_STRIP]
            rows = _resize_rows(logits, top, strip.shape[1], total.shape[1:], self.module.align_corners)
            strip += rows.softmax(0) if len(rows) > 1 else rows.sigmoid()


def _undo_pad_and_flip(logits: torch.Tensor, meta: dict) -> torch.Tensor:
    """Logits, C x h x w, of an image as it was before it was padded and flipped."""
    left, right, top, bottom = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
    logits = logits[:, top : logits.shape[1] - bottom, left : logits.shape[2] - right]
    return logits.flip(2) if meta.get('flip') else logits


def _resize_rows(
    logits: torch.Tensor, top: int, n_rows: int, size: tuple[int, int], align_corners: bool
) -> torch.Tensor:
    """`n_rows` rows from row `top` on of logits, C x h x w, resized bilinearly to `size`, as torch would."""
    (height, width), h = size, logits.shape[1]
    # In fp32 and in this order, since torch's own places are rounded so.
    row = torch.arange(top, top + n_rows, dtype=torch.float32, device=logits.device)
    place = row * ((h - 1) / max(height - 1, 1)) if align_corners else (row + 0.5) * (h / height) - 0.5
    place = place.clamp(0, h - 1)
    upper = place.long()
    lower = (upper + 1).clamp(max=h - 1)
    first, last = int(upper[0]), int(lower[-1])
    wide = interpolate(
        logits[None, :, first : last + 1],
        size=(last + 1 - first, width),
        mode='bilinear',
        align_corners=align_corners,
    )[0]
    weight = (place - upper).to(logits.dtype)[:, None]
    return torch.lerp(wide[:, upper - first], wide[:, lower - first], weight)
