"""mmdet's RTMDet-Ins in the padded form of `boxes`: masks by convolutions whose weights the head predicts."""

import inspect

import mmdet
import torch
from mmdet.models import RTMDet
from mmdet.models.dense_heads import RTMDetInsHead

from ..errors import UsageError
from .boxes import best_detections, flatten_map, take
from .one_stage import METHODS, OneStage, to_float
from .sizes import to_tensor

# mmdet 3.3.0 resizes the height of masks by the scale of the width, and the width by that of the height.
SWAPS_SIDES = 'shape[-2] * scale_factor[0]' in inspect.getsource(RTMDetInsHead._bbox_mask_post_process)


class RTMDetIns(OneStage):
    """Of images to boxes, scores, labels and masks, as RTMDetInsHead predicts."""

    mask_form = 'image'
    heads = (RTMDetInsHead,)
    methods = (*METHODS, '_bbox_mask_post_process', '_mask_predict_by_feat_single', 'parse_dynamic_params')

    def __init__(self, model: RTMDet):
        super().__init__(model)
        if SWAPS_SIDES:
            raise UsageError(
                f'{type(self.head).__name__} of mmdet {mmdet.__version__} cannot be exported, because it swaps the '
                'sides of masks: install convnext_dense[onedl], whose mmdet does not'
            )
        self.threshold = torch.tensor(float(self.test_cfg.mask_thr_binary)).logit().item()  # of logits

    def forward(self, images, shape, scale, size):
        """Detect, as `OneStage` does, with masks (N, K, height, width) of bool in images of `size`."""
        head = self.head
        *maps, prototypes = head(self.model.extract_feat(images))
        *maps, kernels = to_float(maps)
        boxes, scores, labels, points, indices = self.candidates(maps, shape, scale)
        kernels = [take(flatten_map(x, head.num_gen_params), i) for x, i in zip(kernels, indices)]
        all_strides = head.prior_generator.strides
        strides = [torch.full_like(x[..., :1], stride[0]) for x, stride in zip(kernels, all_strides)]
        rows = points, torch.cat(strides, 1), torch.cat(kernels, 1)
        boxes, scores, labels, *rows = best_detections(boxes, scores, labels, self.test_cfg, *rows)
        logits = self._mask_logits(prototypes.float(), *rows)
        rows, columns = _interpolations(logits.shape[-2:], all_strides[0][0], shape, size, logits.device)
        masks = rows @ logits @ columns.T > self.threshold
        return boxes, scores, labels, masks & (labels >= 0)[..., None, None]

    def _mask_logits(self, prototypes, points, strides, kernels):
        """Logits (N, K, h, w) of the masks, of prototypes (N, C, h, w) and, by object, points, strides and kernels."""
        head, size = self.head, prototypes.shape[-2:]
        cells = head.prior_generator.single_level_grid_priors(size, level_idx=0, device=prototypes.device)
        offsets = (points[..., None] - cells.T) / (strides[..., None] * 8)
        prototypes = prototypes.flatten(2)[:, None].expand(-1, points.shape[1], -1, -1)
        x = torch.cat([offsets, prototypes], 2)
        parameters = kernels.split([*head.weight_nums, *head.bias_nums], 2)
        weights, biases = parameters[: head.num_dyconvs], parameters[head.num_dyconvs :]
        for i, (weight, bias) in enumerate(zip(weights, biases)):
            x = weight.unflatten(2, (bias.shape[2], -1)) @ (x if i == 0 else x.relu()) + bias[..., None]
        return x.unflatten(3, size).squeeze(2)


def _interpolations(cells, stride, shape, size, device):
    """Weights (height, h) and (width, w) of the cells of a feature map (h, w) in the pixels of results.

    mmdet enlarges a feature map by its stride to the padded image, that as `shape` is enlarged to `size`, and cuts the
    padding off.
    """
    padded = [n * stride for n in cells]
    n_pixels = scaled_ceil(*(to_tensor(sides, device, torch.int64) for sides in (padded, shape, size)))
    step = torch.full((), 1 / stride, device=device)
    return [
        _bilinear(n_target, n_padded, n_padded / n) @ _bilinear(n_padded, n_cells, step)
        for n_target, n_padded, n, n_cells in zip(size, padded, n_pixels, cells)
    ]


def _bilinear(n_target, n_source, step):
    """Weights (n_target, n_source) of a bilinear interpolation, with the distance of its pixels in the source."""
    positions = ((torch.arange(n_target, device=step.device) + 0.5) * step - 0.5).clamp(min=0)
    positions = torch.minimum(positions, to_tensor([n_source - 1], step.device))  # at the border, its pixel alone
    sources = torch.arange(n_source, device=step.device)
    return (1 - (positions[:, None] - sources).abs()).clamp(min=0)


# ---- float64 in integers ---------------------------------------------------------------------------------------------


def scaled_ceil(padded: torch.Tensor, n: torch.Tensor, n_result: torch.Tensor) -> torch.Tensor:
    """`math.ceil(padded * (1 / (n / n_result)))` as of float64, of int64 from 1 to 2**14 with a ratio up to 2**9.

    So mmdet computes it, and where the product is whole, as that of a side without padding, rounding makes it one more
    in one case of seven. OpenVINO has no float64, and ONNX Runtime makes one division of the two; but the remainders of
    the divisions tell how each is rounded.
    """
    product = padded * n_result
    whole, upper, lower = product // n, n, n_result
    for _ in range(9):  # to lower <= upper < 2 * lower
        upper, lower = torch.where(upper < lower, 2 * upper, upper), torch.where(upper >= 2 * lower, 2 * lower, lower)
    inverse = lower.float() / upper.float()
    error = _rounding(_fraction(upper, lower))  # of upper / lower in [1, 2), in units of 2**-52
    inverse_error = _rounding(2 * _fraction(lower, upper) - 2 * error * inverse**2)  # of 1 / that, of 2**-53
    powers = 2 ** torch.arange(16, device=n.device)
    half_unit = (powers * (powers <= whole[..., None])).amax(-1) / whole  # of the product; it rounds to even, down
    rounds_up = inverse_error / inverse - 2 * error * inverse > half_unit + 3e-6
    return whole + (rounds_up | (product % n > 0))


def _fraction(dividend, divisor):
    """The fractional part of dividend * 2**52 / divisor."""
    power = 2**13 % divisor
    for _ in range(2):
        power = power * power % divisor
    return (power * (dividend % divisor) % divisor).float() / divisor.float()


def _rounding(value):
    """How much rounding to a whole number adds."""
    return value.round() - value
