"""A trained detector or segmentor as one object: `load_model` builds it, `predict` accepts images in any form."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import BaseDataElement, InstanceData
from PIL import Image
from torch import nn

from ..checkpoints.exported_files import is_exported
from ..checkpoints.io import load_checkpoint
from ..checkpoints.pretrained import check_state_dict_matches, load_model_weights
from ..config.tree import iter_dicts
from ..errors import UnreadableImageError, UsageError, is_user_code_error, root_message
from ..models.optimize import optimize
from .checkpoint_config import ModelSource, find_model
from .drawing import draw
from .exported import ExportedModel, check_exported_options
from .images import from_array, from_pil, read_image
from .large_segmentation import labels_alone
from .mask_writer import IGNORED
from .options import PredictOptions, class_indices
from .preprocessing import is_resize, split_test_pipeline
from .sessions import session_device
from .tiling import predict_tiled
from .views import DetectionViews, SegmentationViews

AMP_DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16, 'float32': None}
ImageInput = str | Path | np.ndarray | Image.Image


def load_model(
    checkpoint: str | Path,
    config: str | Path | Config | None = None,
    device: str | None = None,
    amp_dtype: str = 'float32',
) -> 'Predictor':
    """Load a trained detector or segmentor.

    Args:
        checkpoint: A file, a work dir (its best checkpoint, else its last one), a URL, the name of released weights, or
            an exported model (.onnx, .xml or .pt2).
        config: The config or its path. Defaults to the config in the file, or of the recipe of released weights.
        device: Device, such as 'cuda', 'cuda:1' or 'cpu'. Defaults to a GPU if there is one.
        amp_dtype: 'float32', or 'float16' or 'bfloat16' for mixed precision. Of the exported models, only those of
            OpenVINO support 'bfloat16', and none 'float16'.

    Returns:
        The predictor.

    Raises:
        UsageError: If there is no such checkpoint, config or device, or if they do not fit together.
    """
    if amp_dtype not in AMP_DTYPES:
        raise UsageError(f"amp_dtype '{amp_dtype}': give one of {', '.join(AMP_DTYPES)}")
    if not is_exported(checkpoint):
        check_device(device)
    source = find_model(checkpoint, config)
    return build_predictor(source, source_device(source, device), amp_dtype)


def source_device(source: ModelSource, name: str | None) -> torch.device:
    """Return the device for a model by name (None: a GPU if it can use one); raise UsageError if it cannot use it."""
    return session_device(source.file, name) if source.exported else check_device(name)


def check_device(name: str | None) -> torch.device:
    """Return a device by name (None: a GPU if there is one); raise UsageError if it does not exist."""
    try:
        device = torch.device(name or get_device())
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        n = torch.cuda.device_count()
        available = f'cpu and cuda:0 to cuda:{n - 1}' if n > 1 else 'cpu and cuda' if n else 'cpu'
        raise UsageError(f"no device '{name}' ({root_message(error)}): this machine has {available}") from error
    return device


def build_predictor(
    source: ModelSource, device: torch.device, amp_dtype: str = 'float32', optimized: bool = True
) -> 'Predictor':
    """Build the model of a source and load its weights.

    Args:
        source: The model source.
        device: Device on which the model runs.
        amp_dtype: Precision, as for `load_model`.
        optimized: Whether to replace modules by faster ones; otherwise all are mmdet's and mmseg's.

    Raises:
        UsageError: If the model cannot be built, or the weights do not fit it.
    """
    init_default_scope(source.config.default_scope)
    if source.exported:
        check_exported_options(source.exported, PredictOptions(), amp_dtype)
        preprocessor = source.config.get('data_preprocessor')
        model = ExportedModel(source.exported, source.config.model, preprocessor, device, amp_dtype)
        return Predictor(model, source, device)
    try:
        model = revert_sync_batchnorm(MODELS.build(copy.deepcopy(source.config.model)))
        predictor = Predictor(optimize(model) if optimized else model, source, device, amp_dtype)
    except (KeyError, TypeError, AssertionError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, UsageError) or is_user_code_error(error):
            raise
        raise UsageError(f'the config cannot be built: {root_message(error)}') from error
    weights = load_model_weights(load_checkpoint(source.file), source.file, predictor.model)
    check_state_dict_matches(predictor.model, weights, source.file)
    predictor.model.load_state_dict(weights)
    predictor.model.to(device).eval()
    return predictor


class Predictor:
    """A trained model with its test pipeline.

    Attributes:
        model (nn.Module): Model of mmdet or mmseg in evaluation mode, with `cfg` and `dataset_meta` as their inference
            functions expect them; or an `ExportedModel`.
        config (Config): Config of the model.
        task (str): 'detection' or 'segmentation'.
        classes (tuple[str, ...]): Names of the classes.
        palette (tuple): RGB color of each class; empty if the data set has none.
        scale (tuple[int, int] | None): Test scale (long side, short side) in pixels; None if it does not resize.
        color_type (str): How files are read: 'color', 'grayscale' or 'unchanged'.
        device (torch.device): Device on which the model runs.
    """

    def __init__(self, model: nn.Module, source: ModelSource, device: torch.device, amp_dtype: str = 'float32'):
        self.model, self.config, self.task = model, source.config, source.task
        counts = [m.num_classes for m in model.modules() if isinstance(getattr(m, 'num_classes', None), int)]
        n = max(counts, default=0)  # a region proposal network has a single class
        if source.classes and n and len(source.classes) != n:
            raise UsageError(f'{source.file}: there are names of {len(source.classes)} classes, but the model has {n}')
        self.classes = source.classes or tuple(f'class {i}' for i in range(n))
        self.palette, self.device, self.amp_dtype = source.palette, device, amp_dtype
        model.cfg = source.config
        model.dataset_meta = dict(classes=self.classes, palette=[list(color) for color in source.palette] or 'random')
        self.color_type, self.steps = split_test_pipeline(source.config)
        self.pipeline = Compose(self.steps)

    @cached_property
    def views(self) -> DetectionViews | SegmentationViews:
        """The views of an image for `multiscale`."""
        init_default_scope(self.config.default_scope)  # another model may have been loaded since
        return DetectionViews(self.steps) if self.task == 'detection' else SegmentationViews(self.model, self.steps)

    @property
    def scale(self) -> tuple[int, int] | None:
        """Test scale (long side, short side) in pixels; None if the test pipeline does not resize."""
        return next((tuple(step['scale']) for step in iter_dicts(self.steps) if is_resize(step)), None)

    def predict(
        self,
        images: ImageInput | Sequence[ImageInput],
        channel_order: str | None = None,
        **options,
    ) -> BaseDataElement | list[BaseDataElement]:
        """Predict one image or a list of them.

        Args:
            images: A path, a NumPy array, a PIL image, or a list of these.
            channel_order: 'rgb' or 'bgr'; required for color arrays.
            **options: Arguments of `PredictOptions`.

        Returns:
            mmdet's DetDataSample with `pred_instances`, or mmseg's SegDataSample with `pred_sem_seg`, in pixels of the
            upright image, on the CPU; a list for a list. With `tile`, masks of detections are COCO RLEs.

        Raises:
            UsageError: If an option or an image cannot be used.
        """
        in_tiles = PredictOptions(**options).tile is not None
        is_one = not isinstance(images, (list, tuple))
        images = [images] if is_one else images
        if in_tiles:
            samples = [self._predict_input_in_tiles(image, channel_order, options) for image in images]
        else:
            samples = self.predict_arrays([self.read(image, channel_order) for image in images], **options)
        for image, sample in zip(images, samples):
            if isinstance(image, (str, Path)):
                sample.set_metainfo(dict(img_path=str(image)))
        return samples[0] if is_one else samples

    def _predict_input_in_tiles(self, image: ImageInput, channel_order: str | None, options: dict) -> BaseDataElement:
        if not isinstance(image, (str, Path)):
            return self.predict_arrays([self.read(image, channel_order)], **options)[0]
        try:
            return self.predict_arrays([image], **options)[0]  # reads the file by rows if possible
        except UnreadableImageError as error:
            raise UsageError(f'{image}: {error}') from error

    def read(self, image: ImageInput, channel_order: str | None = None) -> np.ndarray:
        """Return the pixels of an image for the model: (H, W, C) BGR, or (H, W) for a grayscale model."""
        if isinstance(image, (str, Path)):
            try:
                return read_image(image, self.color_type).pixels
            except UnreadableImageError as error:
                raise UsageError(f'{image}: {error}') from error
        if isinstance(image, Image.Image):
            return from_pil(image, self.color_type)
        if isinstance(image, np.ndarray):
            return from_array(image, channel_order, self.color_type)
        raise UsageError(f'a {type(image).__name__} is not an image: give a path, a numpy array or a PIL image')

    def predict_arrays(
        self, images: Sequence[np.ndarray | dict], with_logits: bool = False, **options
    ) -> list[BaseDataElement]:
        """Predict images that are loaded.

        Args:
            images: Images from `read`, (H, W, C) BGR of uint8, or results of `prepare`. With `tile`, also paths.
            with_logits: Whether segmentors also return `seg_logits` (C, H, W).
            **options: Arguments of `PredictOptions`.

        Returns:
            A DetDataSample or SegDataSample per image, on the CPU.
        """
        options = PredictOptions(**options)
        if isinstance(self.model, ExportedModel):
            check_exported_options(self.model.file, options, with_logits=with_logits)
        if options.tile:
            samples = [predict_tiled(self, image, options, with_logits) for image in images]
        elif options.multiscale:
            samples = [self.predict_views(image, with_logits) for image in images]
        else:
            prepared = [image if isinstance(image, dict) else self.prepare(image) for image in images]
            only_labels = self.task == 'segmentation' and not with_logits and not isinstance(self.model, ExportedModel)
            with labels_alone(self.model) if only_labels else nullcontext():
                samples = self.forward(prepared, options.batch_size)
        return self.finish(samples, options, with_logits)

    @torch.inference_mode()
    def predict_views(self, image: np.ndarray, with_logits: bool = False) -> BaseDataElement:
        """Predict an image (H, W, C) at several scales, with and without flip."""
        if self.task == 'detection':
            return self.views.predict(self, image)
        with self.autocast():
            return self.views.predict(self.prepare(image, self.views.pipeline), with_logits)

    def prepare(self, image: np.ndarray, pipeline: Compose | None = None) -> dict:
        """Apply the test pipeline of the config to an image (H, W, C); runs on the CPU and is thread-safe.

        Raises:
            UnreadableImageError: If the image is too thin to be resized.
        """
        size = image.shape[:2]
        try:
            return (pipeline or self.pipeline)(dict(img=image, img_id=0, img_path=None, img_shape=size, ori_shape=size))
        except Exception as error:
            if min(size) * 50 > max(size):
                raise
            reason = f'{size[1]} x {size[0]} pixels are too thin to be resized to the scale of the model; use tiles'
            raise UnreadableImageError(reason) from error

    @torch.inference_mode()
    def forward(self, prepared: Sequence[dict], batch_size: int = 1) -> list[BaseDataElement]:
        """Run the model on prepared images, batching only images of equal size, so that none is padded."""
        samples: list = [None] * len(prepared)
        by_shape: dict[tuple, list[int]] = {}
        for i, item in enumerate(prepared):
            by_shape.setdefault(tuple(item['inputs'].shape), []).append(i)
        for indices in by_shape.values():
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                data = {key: [prepared[i][key] for i in batch] for key in ('inputs', 'data_samples')}
                with self.autocast():
                    results = self.model.test_step(data)
                for i, result in zip(batch, results):
                    samples[i] = result
        return samples

    def autocast(self) -> AbstractContextManager:
        """Return the context manager for the precision of the model."""
        dtype = AMP_DTYPES[self.amp_dtype]
        return torch.autocast(self.device.type, dtype) if dtype else nullcontext()

    def finish(
        self, samples: Sequence[BaseDataElement], options: PredictOptions, with_logits: bool = False
    ) -> list[BaseDataElement]:
        """Move samples to the CPU and filter them by the classes, scores and number in the options."""
        selected = class_indices(options.classes, self.classes)
        for sample in samples:
            if self.task == 'detection':
                sample.pred_instances = _select_instances(sample.pred_instances, options, selected)
                continue
            if not with_logits and 'seg_logits' in sample:
                del sample.seg_logits
            if selected is not None:
                labels = sample.pred_sem_seg.data
                is_other = ~torch.isin(labels, torch.as_tensor(selected, dtype=labels.dtype, device=labels.device))
                sample.pred_sem_seg.data = labels.masked_fill(is_other, IGNORED)
        return [sample.to('cpu') for sample in samples]

    def draw(self, image: ImageInput, sample: BaseDataElement, channel_order: str | None = None) -> Image.Image:
        """Draw a prediction onto its image.

        Args:
            image: A path, a NumPy array or a PIL image.
            sample: Data sample from `predict`.
            channel_order: 'rgb' or 'bgr'; required for a color array.
        """
        picture = draw(self.read(image, channel_order), sample, self.classes, self.palette)
        return Image.fromarray(picture[..., ::-1])


def _select_instances(instances: InstanceData, options: PredictOptions, selected: Sequence[int] | None) -> InstanceData:
    """Return the detections that the options leave, in their order, of the selected classes (None: of all)."""
    keep = torch.ones_like(instances.labels, dtype=torch.bool)
    if options.score_thr is not None:
        keep &= instances.scores >= options.score_thr
    if selected is not None:
        keep &= torch.isin(instances.labels, torch.as_tensor(selected, device=instances.labels.device))
    indices = keep.nonzero().flatten()
    if options.max_per_image is not None and len(indices) > options.max_per_image:
        best = instances.scores[indices].argsort(descending=True, stable=True)[: options.max_per_image]
        indices = indices[best.sort().values]
    return instances[indices] if len(indices) < len(keep) else instances
