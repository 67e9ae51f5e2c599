"""An exported model (ONNX, OpenVINO, torch.export) with the interface of mmdet's and mmseg's models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import cv2
import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import nn
from torch.nn.functional import interpolate

from ..channel_files import denormalize
from ..checkpoints.exported_files import ExportedFile, read_exported
from ..checkpoints.exported_meta import CHANNELS
from ..errors import UsageError, count
from .options import PredictOptions
from .sessions import session_class, session_device

OUTPUTS = {'detection': ({'boxes', 'scores', 'labels'},), 'segmentation': ({'segmentation'}, {'logits'})}
MASK_THR, BINARY_THR = 0.5, 0.3  # defaults of mmdet and mmseg for configs without thresholds


def check_exported_options(
    file: ExportedFile, options: PredictOptions, amp_dtype: str = 'float32', with_logits: bool = False
) -> None:
    """Raise UsageError if an exported model, which need not be loaded, does not support options and precision."""
    session_class(file.path).check_amp_dtype(amp_dtype)
    is_segmentation = file.meta.task == 'segmentation'
    if options.multiscale and (is_segmentation or file.meta.size or file.meta.input == 'raw'):
        purpose = 'for segmentation' if is_segmentation else 'at other sizes'
        raise UsageError(f'multiscale {purpose} is not in an exported model: predict with the checkpoint')
    if is_segmentation and (options.tile or with_logits) and 'logits' not in (file.outputs or ['logits']):
        purpose = 'tile' if options.tile else 'seg_logits'
        raise UsageError(
            f'{file.path}: {purpose} needs logits, which the exported model does not return: export it with --logits'
        )


class Geometry(NamedTuple):
    """Position of an image in the input and in the results of an exported model; all sizes are (height, width).

    Attributes:
        content: Size of the image in the input, of which it fills the upper left.
        canvas: Size of the input, with padding.
        space: Size to whose pixels the results refer.
        original: Size of the image as it was read.
    """

    content: tuple[int, int]
    canvas: tuple[int, int]
    space: tuple[int, int]
    original: tuple[int, int]

    @property
    def is_identity(self) -> bool:
        """Whether the results are in pixels of the original image."""
        return self.content == self.canvas and self.space == self.original


@MODELS.register_module()
class ExportedModel(nn.Module):
    """An exported model with the `test_step` of mmdet's and mmseg's models.

    For a file with a fixed input size, images are padded at the right and bottom with the mean that the model
    subtracts, and images that are larger at the test scale are reduced to fit. Results then differ from the
    checkpoint's where the model sees the padding, and if the image was reduced. For a raw file, masks and segmentation
    are resized from the pixels of the input, which differs from the checkpoint's at edges, too.

    Args:
        file: The model, or the path of its file.
        model: Config of the model that was exported.
        data_preprocessor: Config of its data preprocessor, if it is not part of `model`.
        device: Such as 'cuda:0'; None for a GPU if the runtime can use one, else the CPU.
        amp_dtype: 'float32', or 'bfloat16' for OpenVINO.

    Raises:
        UsageError: If the file cannot be loaded, or its outputs do not match its metadata.
    """

    def __init__(
        self,
        file: str | ExportedFile,
        model: Mapping,
        data_preprocessor: Mapping | None = None,
        device: str | torch.device | None = None,
        amp_dtype: str = 'float32',
    ):
        super().__init__()
        file = file if isinstance(file, ExportedFile) else read_exported(file)
        self.meta = meta = file.meta
        self.task, self.num_classes = meta.task, len(meta.classes)
        self.test_cfg = ConfigDict(model.get('test_cfg') or {})
        head = model.get('decode_head') or {}
        head = head[-1] if isinstance(head, (list, tuple)) else head
        self.decode_head = SimpleNamespace(threshold=head.get('threshold') or BINARY_THR)
        # RTMDet-Ins resizes its masks, with the padding, to sides that are rounded up.
        self.round_side = math.ceil if 'RTMDetIns' in str((model.get('bbox_head') or {}).get('type')) else round
        preprocessor = model.get('data_preprocessor') or data_preprocessor or {}
        self.has_channels = meta.input == CHANNELS
        keeps_order = self.has_channels or preprocessor.get('bgr_to_rgb')
        self.mean = (meta.mean if keeps_order else meta.mean[::-1]) or [0.0]  # in the order of `images`
        self.preprocessor = MODELS.build(preprocessor) if meta.input == 'raw' else None
        device = session_device(file.path, device and str(device))
        self.session = session_class(file.path)(file.path, device, amp_dtype)
        names = self.session.outputs
        self.file = replace(file, outputs=names)
        if not any(expected <= set(names) for expected in OUTPUTS[self.task]):
            raise UsageError(f'{self.file.path} returns {", ".join(names)}, not those of {self.task}: export it again')

    def __deepcopy__(self, memo: dict) -> 'ExportedModel':
        return self  # runtimes cannot be copied, and the model has no state

    def forward(self, *args, **kwargs):
        """Refuse everything but `test_step`."""
        raise NotImplementedError('an exported model has no forward: call test_step')

    def val_step(self, data: dict) -> list[BaseDataElement]:
        """Predict a batch; as `test_step`."""
        return self.test_step(data)

    @torch.no_grad()
    def test_step(self, data: dict) -> list[BaseDataElement]:
        """Predict a batch.

        Args:
            data: `inputs`, a list of (C, H, W) or a tensor (N, C, H, W), BGR or other channels, normalized, and
                `data_samples` with `ori_shape`, as the test pipeline packs them.

        Returns:
            The data samples with `pred_instances` (bboxes, scores, labels, masks), or with `pred_sem_seg` and, if the
            file returns logits, `seg_logits`; on the CPU, in pixels of the original images.
        """
        samples = list(data['data_samples'])
        if self.task == 'detection':
            from mmdet.models.utils import samplelist_boxtype2tensor

            samplelist_boxtype2tensor(samples)  # boxes of the ground truth, as mmdet's data preprocessor does
        groups: dict[tuple, list[int]] = {}
        for i, (image, sample) in enumerate(zip(data['inputs'], samples)):
            groups.setdefault((tuple(image.shape), tuple(sample.ori_shape[:2])), []).append(i)
        for indices in groups.values():
            n = self.session.batch or len(indices)
            for start in range(0, len(indices), n):
                batch = indices[start : start + n]
                filled = batch + batch[-1:] * ((self.session.batch or 0) - len(batch))
                self._predict([data['inputs'][i] for i in filled], [samples[i] for i in filled], len(batch))
        return samples

    def _predict(self, inputs: list[torch.Tensor], samples: list[BaseDataElement], n: int) -> None:
        """Set the predictions of the first `n` images of one size; the others only fill the batch."""
        images, geometry = self._prepare(inputs, samples)
        outputs = self.session.run(images, None if self.meta.input == 'raw' else geometry.space)
        for i in range(n):
            tensors = {name: torch.from_numpy(np.array(array[i])) for name, array in outputs.items()}
            if self.task == 'detection':
                samples[i].pred_instances = self._instances(tensors, geometry)
            else:
                samples[i].set_data(self._segmentation(tensors, geometry))

    def _prepare(self, inputs: list[torch.Tensor], samples: list[BaseDataElement]) -> tuple[np.ndarray, Geometry]:
        """Return images (N, C, H, W) as the file expects them, and their geometry."""
        original = tuple(map(int, samples[0].ori_shape[:2]))
        inputs = [image.cpu() for image in inputs]
        if len(inputs[0]) != (self.meta.channels or len(inputs[0])):
            channels = count(len(inputs[0]), 'channel')
            raise UsageError(f'images of {channels}: {self.file.path} takes {self.meta.channels}')
        shape, size = tuple(inputs[0].shape[1:]), self.session.size
        content = _content(shape, samples[0]) if self.task == 'detection' else shape
        if size and (shape[0] > size[0] or shape[1] > size[1]):
            inputs = [_reduce(image, size) for image in inputs]
            reduced = tuple(inputs[0].shape[1:])
            content = tuple(max(round(c * r / s), 1) for c, r, s in zip(content, reduced, shape))
        if self.preprocessor is not None:
            images = self.preprocessor(dict(inputs=inputs, data_samples=samples), False)['inputs']
            images = _pad(images.numpy(), size, [0.0])
            return images, Geometry(content, images.shape[2:], images.shape[2:], original)
        images = torch.stack(inputs).numpy()
        if self.has_channels:
            images = denormalize(images, self.meta.mean, self.meta.std)
        elif images.shape[1] == 3:
            images = images[:, ::-1]
        dtype = np.dtype('float32' if self.has_channels else self.meta.input)
        if images.dtype != dtype:
            images = (images.round().clip(0, 255) if dtype == np.uint8 else images).astype(dtype)
        images = _pad(images, size, self.mean)
        canvas = images.shape[2:]
        space = tuple(max(self.round_side(s * o / c), o) for s, o, c in zip(canvas, original, content))
        return images, Geometry(content, canvas, space, original)

    def _instances(self, tensors: dict[str, torch.Tensor], geometry: Geometry) -> InstanceData:
        keep = tensors['labels'] >= 0
        boxes, scores, labels = (tensors[name][keep] for name in ('boxes', 'scores', 'labels'))
        boxes = boxes.float()
        if not geometry.is_identity:
            (h, w), (canvas_h, canvas_w), (space_h, space_w), (height, width) = geometry
            factors = boxes.new_tensor([canvas_w / space_w * width / w, canvas_h / space_h * height / h] * 2)
            boxes = (boxes * factors).clamp(min=0).minimum(boxes.new_tensor([width, height] * 2))
        instances = InstanceData(bboxes=boxes, scores=scores.float(), labels=labels.long())
        if 'masks' in tensors:
            instances.masks = self._masks(tensors['masks'][keep], boxes, geometry)
        return instances

    def _masks(self, masks: torch.Tensor, boxes: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        if self.meta.masks == 'box':
            threshold = (self.test_cfg.get('rcnn') or self.test_cfg).get('mask_thr_binary', MASK_THR)
            return _paste(masks.float(), boxes, geometry.original, threshold)
        masks = masks.bool()
        if geometry.is_identity:
            return masks
        result = torch.zeros(len(masks), *geometry.original, dtype=torch.bool)
        for target, mask in zip(result, masks):
            target[:] = _to_original(mask[None], geometry, 'bilinear')[0] >= 0.5
        return result

    def _segmentation(self, tensors: dict[str, torch.Tensor], geometry: Geometry) -> dict[str, PixelData]:
        if 'logits' not in tensors:
            labels = _to_original(tensors['segmentation'][None], geometry, 'nearest').long()
            return dict(pred_sem_seg=PixelData(data=labels))
        logits = _to_original(tensors['logits'].float(), geometry, 'bilinear')
        is_one = len(logits) == 1  # a single class: the file returns probabilities, as mmseg does
        labels = (logits > self.decode_head.threshold).to(logits) if is_one else logits.argmax(0, keepdim=True)
        return dict(seg_logits=PixelData(data=logits), pred_sem_seg=PixelData(data=labels))


def _to_original(maps: torch.Tensor, geometry: Geometry, mode: str) -> torch.Tensor:
    """Crop maps (C, h, w) of a result to the image, and resize them to its original size (C, H, W)."""
    if geometry.is_identity:
        return maps
    # Maps in pixels of the input hold the padding, too.
    height, width = geometry.content if geometry.space == geometry.canvas else geometry.original
    maps = maps[:, :height, :width]
    if maps.shape[1:] == geometry.original:
        return maps
    return interpolate(maps[None].float(), geometry.original, mode=mode)[0]


def _content(shape: tuple[int, int], sample: BaseDataElement) -> tuple[int, int]:
    """Size of the image inside its input, which a test pipeline may have padded, as RTMDet's does."""
    factors = sample.metainfo.get('scale_factor')
    if factors is None:
        return shape
    sides = (round(side * factor) for side, factor in zip(sample.ori_shape, reversed(factors)))
    return tuple(min(max(side, 1), padded) for side, padded in zip(sides, shape))


def _reduce(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Reduce an image (C, H, W) to fit into a size (H, W), keeping its aspect ratio."""
    height, width = image.shape[1:]
    factor = min(size[0] / height, size[1] / width)
    new = [max(int(side * factor + 0.5), 1) for side in (width, height)]
    pixels = cv2.resize(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), new, interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(pixels.reshape(new[1], new[0], -1)).permute(2, 0, 1).contiguous()


def _pad(images: np.ndarray, size: tuple[int, int] | None, values: Sequence[float]) -> np.ndarray:
    """Pad images (N, C, H, W) at the right and bottom with one value per channel."""
    height, width = images.shape[2:]
    if size is None or (height, width) == tuple(size):
        return images
    values = np.array(values, np.float64)
    values = values.round() if images.dtype == np.uint8 else values
    result = np.empty((*images.shape[:2], *size), images.dtype)
    result[:] = values.astype(images.dtype).reshape(-1, 1, 1)
    result[:, :, :height, :width] = images
    return result


def _paste(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], threshold: float) -> torch.Tensor:
    """Paste probabilities (n, 28, 28) in boxes (n, 4) into an image (H, W), as mmdet's mask head does."""
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    result = torch.zeros(len(masks), *size, dtype=torch.bool)
    for target, mask, box in zip(result, masks, boxes):
        pasted, region = _do_paste_mask(mask[None, None], box[None], *size, skip_empty=True)
        target[region] = pasted[0] >= threshold
    return result
