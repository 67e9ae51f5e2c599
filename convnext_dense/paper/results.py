"""The thirteen dense prediction results of the paper as data ("A ConvNet for the 2020s", tables 3, 4 and 11)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from mmengine.config import Config

from ..config.tree import mismatched_keys

TOTAL_BATCH = 16  # images per optimizer step, of every recipe (appendix A.3)
# Metrics of a detection result in the order in which the paper prints them, and of a segmentation result.
DETECTION_METRICS = ('box AP', 'box AP50', 'box AP75', 'mask AP', 'mask AP50', 'mask AP75')
SEGMENTATION_METRICS = ('mIoU', 'mIoU multi-scale')
MAIN_METRICS = ('box AP', 'mask AP', *SEGMENTATION_METRICS)
# Metric -> its key in the results of mmdet's and mmseg's evaluators, and the factor that makes it percent.
EVALUATOR_KEYS = {
    'box AP': ('coco/bbox_mAP', 100),
    'box AP50': ('coco/bbox_mAP_50', 100),
    'box AP75': ('coco/bbox_mAP_75', 100),
    'mask AP': ('coco/segm_mAP', 100),
    'mask AP50': ('coco/segm_mAP_50', 100),
    'mask AP75': ('coco/segm_mAP_75', 100),
    'mIoU': ('mIoU', 1),
}
# How far from the paper's metric, in percentage points, a faithful retraining and the released weights may lie.
RETRAIN_TOLERANCE = {'box AP': 0.3, 'mask AP': 0.3, 'mIoU': 0.5, 'mIoU multi-scale': 0.5}
RELEASED_TOLERANCE = 0.1


@dataclass(frozen=True)
class PaperResult:
    """One result of the paper, with the settings by which its recipe differs from the others.

    Attributes:
        recipe: Name of the config without its ending, such as 'cascade/convnext_t'.
        arch: Size of the backbone, a key of `ARCHS`.
        weights: Name of the pretrained weights of the backbone.
        released: Name of the checkpoint that the authors released.
        drop_path_rate: Stochastic depth rate of the last block.
        lr: Base learning rate.
        decay_rate: Rate of the layer-wise or stage-wise learning rate decay.
        metrics: AP or mIoU in percent, by `DETECTION_METRICS` or `SEGMENTATION_METRICS`.
        params_m: Parameters of the whole model in millions, as printed in the paper.
        gflops: Multiply-accumulates of an image of `size` in billions, as printed in the paper.
        size: (width, height) at which `gflops` are counted.
        precision: 'float16' (mixed precision) or 'float32'.
    """

    recipe: str
    arch: str
    weights: str
    released: str
    drop_path_rate: float
    lr: float
    decay_rate: float
    metrics: Mapping[str, float]
    params_m: int
    gflops: int
    size: tuple[int, int]
    precision: str = 'float16'

    @property
    def is_detection(self) -> bool:
        """Whether it is a result on COCO, not on ADE20K."""
        return 'mIoU' not in self.metrics

    @property
    def decay_type(self) -> str:
        """How layers are grouped for the learning rate decay."""
        return 'layer_wise' if self.is_detection else 'stage_wise'

    @property
    def crop_size(self) -> int | None:
        """Side of the training crop on ADE20K in pixels; None on COCO."""
        return None if self.is_detection else self.size[1]

    @cached_property
    def identity(self) -> dict[str, object]:
        """The settings of a config, by dotted key, that only the recipe of this result has."""
        common = {'model.backbone.arch': self.arch, 'model.backbone.drop_path_rate': self.drop_path_rate}
        # Classes that are named are not COCO's or ADE20K's own: other data, even if of as many classes.
        common |= {f'{split}_dataloader.dataset.metainfo': None for split in ('train', 'test')}
        if self.is_detection:
            model = {'mask_rcnn': 'MaskRCNN', 'cascade': 'CascadeRCNN'}[self.recipe.split('/')[0]]
            return {
                **common,
                'model.type': model,
                'model.roi_head.mask_head.num_classes': 80,
                'train_dataloader.dataset.type': 'CocoDataset',
            }
        return {
            **common,
            'model.decode_head.type': 'UPerHead',
            'model.decode_head.num_classes': 150,
            'model.test_cfg.crop_size': (self.crop_size, self.crop_size),
            'train_dataloader.dataset.type': 'ADE20KDataset',
        }


def _coco(
    recipe, arch, weights, drop_path_rate, lr, decay_rate, box, mask, params_m, gflops, precision='float16'
) -> PaperResult:
    model = {'mask_rcnn': 'mask_rcnn', 'cascade': 'cascade_mask_rcnn'}[recipe.split('/')[0]]
    return PaperResult(
        recipe=recipe,
        arch=arch,
        weights=f'convnext_{arch}_{weights}_224',
        released=f'{model}_convnext_{arch}_{weights}_3x',
        drop_path_rate=drop_path_rate,
        lr=lr,
        decay_rate=decay_rate,
        metrics=dict(zip(DETECTION_METRICS, box + mask)),
        params_m=params_m,
        gflops=gflops,
        size=(1280, 800),
        precision=precision,
    )


def _ade20k(
    recipe, arch, weights, crop, drop_path_rate, lr, single, multi, params_m, gflops, precision='float16'
) -> PaperResult:
    return PaperResult(
        recipe=recipe,
        arch=arch,
        weights=f'convnext_{arch}_{weights}_224',
        released=f'upernet_convnext_{arch}_{weights}_{crop}x{crop}',
        drop_path_rate=drop_path_rate,
        lr=lr,
        decay_rate=0.9,
        metrics={'mIoU': single, 'mIoU multi-scale': multi},
        params_m=params_m,
        gflops=gflops,
        size=(4 * crop, crop),
        precision=precision,
    )


# fmt: off
PAPER_RESULTS = (
    # recipe, arch, weights, drop path, lr, decay rate, box AP/50/75, mask AP/50/75, M parameters, GFLOPs
    _coco('mask_rcnn/convnext_t', 'tiny', '1k', 0.4, 1e-4, 0.95, (46.2, 67.9, 50.8), (41.7, 65.0, 44.9), 48, 262),
    _coco('cascade/convnext_t', 'tiny', '1k', 0.4, 2e-4, 0.7, (50.4, 69.1, 54.8), (43.7, 66.5, 47.3), 86, 741),
    _coco('cascade/convnext_s', 'small', '1k', 0.6, 2e-4, 0.7, (51.9, 70.8, 56.5), (45.0, 68.4, 49.1), 108, 827),
    _coco('cascade/convnext_b', 'base', '1k', 0.7, 2e-4, 0.8, (52.7, 71.3, 57.2), (45.6, 68.9, 49.5), 146, 964),
    _coco('cascade/convnext_b_in22k', 'base', '22k', 0.6, 1e-4, 0.8,
          (54.0, 73.1, 58.8), (46.9, 70.6, 51.3), 146, 964),
    _coco('cascade/convnext_l_in22k', 'large', '22k', 0.7, 1e-4, 0.7,
          (54.8, 73.8, 59.8), (47.6, 71.3, 51.7), 255, 1354, 'float32'),
    _coco('cascade/convnext_xl_in22k', 'xlarge', '22k', 0.8, 1e-4, 0.7,
          (55.2, 74.2, 59.9), (47.7, 71.6, 52.2), 407, 1898, 'float32'),
    # recipe, arch, weights, crop, drop path, lr, mIoU single scale, multi-scale, M parameters, GFLOPs
    _ade20k('upernet/convnext_t', 'tiny', '1k', 512, 0.4, 1e-4, 46.0, 46.7, 60, 939),
    _ade20k('upernet/convnext_s', 'small', '1k', 512, 0.3, 1e-4, 48.7, 49.6, 82, 1027),
    _ade20k('upernet/convnext_b', 'base', '1k', 512, 0.4, 1e-4, 49.1, 49.9, 122, 1170),
    _ade20k('upernet/convnext_b_in22k', 'base', '22k', 640, 0.4, 1e-4, 52.6, 53.1, 122, 1828),
    _ade20k('upernet/convnext_l_in22k', 'large', '22k', 640, 0.4, 1e-4, 53.2, 53.7, 235, 2458, 'float32'),
    _ade20k('upernet/convnext_xl_in22k', 'xlarge', '22k', 640, 0.4, 8e-5, 53.6, 54.0, 391, 3335, 'float32'),
)
# fmt: on


def to_paper_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Convert the results of an evaluator to the paper's metrics.

    Args:
        metrics: Results by the keys of mmdet's `CocoMetric` or mmseg's `IoUMetric`.

    Returns:
        Metrics in percent by the paper's names; others are left out.
    """
    values = {name: (metrics.get(key), factor) for name, (key, factor) in EVALUATOR_KEYS.items()}
    return {name: factor * value for name, (value, factor) in values.items() if value is not None}


def find_paper_result(config: Config) -> PaperResult | None:
    """Find the paper's result whose recipe a config is, whatever file it came from.

    Args:
        config: Config of a model, such as mmengine keeps in a work dir.

    Returns:
        The result; None where the config is no recipe of the paper.
    """
    return next((result for result in PAPER_RESULTS if not mismatched_keys(config, result.identity)), None)
