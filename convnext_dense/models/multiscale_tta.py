"""The paper's multi-scale test for segmentation, as test-time augmentation of mmengine."""

import torch
from mmengine.model import BaseTTAModel
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from torch.nn.functional import interpolate

ROWS_PER_STRIP = 8  # rows of the image that are resized and accumulated at a time, to save memory


@MODELS.register_module()
class MultiScaleSegmentor(BaseTTAModel):
    """Segmentor tested on several views (scales, flips) of each image, whose probabilities are averaged."""

    @torch.no_grad()
    def test_step(self, data: dict, with_logits: bool = False) -> list:
        """Predict a batch.

        Args:
            data: For each key, a list with one batch per view.
            with_logits: Whether the samples also get the probabilities (C, H, W), as `seg_logits`.

        Returns:
            The data samples of the first view, with `pred_sem_seg` (1, H, W) at the image's own size.
        """
        samples, probabilities = self.probabilities(data)
        for sample, p in zip(samples, probabilities):
            pred = p.argmax(0, keepdim=True) if len(p) > 1 else (p > self.module.decode_head.threshold).to(p)
            sample.set_data({'pred_sem_seg': PixelData(data=pred)})
            if with_logits:
                sample.set_data({'seg_logits': PixelData(data=p)})
        return samples

    def probabilities(self, data: dict) -> tuple[list, list[torch.Tensor]]:
        """Average the softmax of all views.

        Args:
            data: For each key, a list with one batch per view.

        Returns:
            The data samples of the first view, and for each image probabilities (C, H, W) at its own size.
        """
        views = [dict(zip(data, view)) for view in zip(*data.values())]
        ref_samples, totals = None, []
        for view in views:
            view = self.module.data_preprocessor(view, False)
            samples = view['data_samples']
            logits = self.module.inference(view['inputs'], [sample.metainfo for sample in samples])
            if ref_samples is None:
                ref_samples = samples
                totals = [logits.new_zeros(logits.shape[1], *sample.ori_shape) for sample in samples]
            for total, logit, sample in zip(totals, logits, samples):
                self._accumulate(total, _undo_pad_and_flip(logit, sample.metainfo))
        return ref_samples, [total.div_(len(views)) for total in totals]

    def merge_preds(self, data_samples_list):
        """Not used: `test_step` accumulates the views one by one."""
        raise NotImplementedError('test_step accumulates the views one by one')

    def _accumulate(self, total: torch.Tensor, logits: torch.Tensor) -> None:
        for top in range(0, total.shape[1], ROWS_PER_STRIP):
            strip = total[:, top : top + ROWS_PER_STRIP]
            rows = _resize_rows(logits, top, strip.shape[1], total.shape[1:], self.module.align_corners)
            strip += rows.softmax(0) if len(rows) > 1 else rows.sigmoid()


def _undo_pad_and_flip(logits: torch.Tensor, meta: dict) -> torch.Tensor:
    """Remove the padding and the flip of the image from logits (C, h, w)."""
    left, right, top, bottom = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
    logits = logits[:, top : logits.shape[1] - bottom, left : logits.shape[2] - right]
    return logits.flip(2) if meta.get('flip') else logits


def _resize_rows(
    logits: torch.Tensor, top: int, n_rows: int, size: tuple[int, int], align_corners: bool
) -> torch.Tensor:
    """Return rows `top` to `top + n_rows` of logits (C, h, w) resized bilinearly to `size`, exactly as torch does."""
    (height, width), h = size, logits.shape[1]
    # In fp32 and in this order, to round positions as torch does.
    row = torch.arange(top, top + n_rows, dtype=torch.float32, device=logits.device)
    src = row * ((h - 1) / max(height - 1, 1)) if align_corners else (row + 0.5) * (h / height) - 0.5
    src = src.clamp(0, h - 1)
    upper = src.long()
    lower = (upper + 1).clamp(max=h - 1)
    first_row, last_row = int(upper[0]), int(lower[-1])
    wide = interpolate(
        logits[None, :, first_row : last_row + 1],
        size=(last_row + 1 - first_row, width),
        mode='bilinear',
        align_corners=align_corners,
    )[0]
    weight = (src - upper).to(logits.dtype)[:, None]
    return torch.lerp(wide[:, upper - first_row], wide[:, lower - first_row], weight)
