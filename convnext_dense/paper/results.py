"""The dense prediction results of the paper as data ("A ConvNet for the 2020s", tables 3, 4 and 11).

`PAPER_RESULTS` are the thirteen of ConvNeXt, `BASELINE_RESULTS` those of the paper's baselines, `LATER_RESULTS` later
results of ConvNeXt and ConvNeXt V2 by others, `DINO_RESULTS` those of detrex. `UNTRAINED_RESULTS` have no metrics,
because nobody has published results of these recipes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath

from mmengine.config import Config

from ..config.tree import get_dotted, is_equal
from ..type_names import short_name

TOTAL_BATCH = 16  # images per optimizer step in every recipe of the paper (appendix A.3)
# Metrics of detection results, in the order of the paper, and of segmentation results.
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
# Tolerance in percentage points for the difference to the paper, of a faithful retraining and of the released weights.
RETRAIN_TOLERANCE = {'box AP': 0.3, 'mask AP': 0.3, 'mIoU': 0.5, 'mIoU multi-scale': 0.5}
RELEASED_TOLERANCE = 0.1


@dataclass(frozen=True)
class PaperResult:
    """A result of the paper, with the settings in which its recipe differs from the others.

    Attributes:
        recipe: Name of the config without suffix, such as 'cascade/convnext_t'.
        arch: Size of the backbone, a key of `ARCHS`.
        pretraining: ImageNet-'1k' or -'22k', or 'DINOv3'.
        drop_path_rate: Stochastic depth rate of the last block.
        lr: Base learning rate.
        decay_rate: Rate of the layer-wise or stage-wise learning rate decay.
        values: AP or mIoU in percent, in the order of `DETECTION_METRICS` or `SEGMENTATION_METRICS`.
        params_m: Published number of parameters of the whole model, in millions; None if unpublished.
        gflops: Published multiply-accumulates for an image of `size`, in billions; None if unpublished.
        size: (width, height) at which `gflops` are counted.
        precision: 'float16' (mixed precision) or 'float32'.
        total_batch: Images per optimizer step.
        weights_name: Name of the pretrained weights; by default the original ones of this size, or timm's copy of
            DINOv3's.
    """

    recipe: str
    arch: str
    pretraining: str
    drop_path_rate: float
    lr: float
    decay_rate: float | None
    values: tuple[float | None, ...]
    params_m: int | None = None
    gflops: int | None = None
    size: tuple[int, int] = (1280, 800)
    precision: str = 'float16'
    total_batch: int = TOTAL_BATCH
    weights_name: str = ''

    @property
    def is_detection(self) -> bool:
        """Whether it is a result on COCO, not on ADE20K."""
        return len(self.values) == len(DETECTION_METRICS)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """`DETECTION_METRICS` or `SEGMENTATION_METRICS`."""
        return DETECTION_METRICS if self.is_detection else SEGMENTATION_METRICS

    @property
    def metrics(self) -> dict[str, float]:
        """Published AP or mIoU in percent, by `metric_names`."""
        return {name: value for name, value in zip(self.metric_names, self.values) if value is not None}

    @property
    def main_metrics(self) -> list[str]:
        """Those of `MAIN_METRICS` that were published; the first metric of an untrained recipe."""
        return [name for name in MAIN_METRICS if name in self.metrics] or [self.metric_names[0]]

    @property
    def weights(self) -> str:
        """Name of the pretrained weights of the backbone."""
        if self.pretraining == 'DINOv3':
            return f'hf-hub:timm/convnext_{self.arch}.dinov3_lvd1689m'
        return self.weights_name or f'convnext_{self.arch}_{self.pretraining}_224'

    @property
    def released(self) -> str | None:
        """Name of the checkpoint that the authors released; None if there is none."""
        model = self.recipe.split('/')[0].replace('cascade', 'cascade_mask_rcnn')
        schedule = '3x' if self.is_detection else f'{self.crop_size}x{self.crop_size}'
        return f'{model}_convnext_{self.arch}_{self.pretraining}_{schedule}'

    @property
    def crop_size(self) -> int | None:
        """Side of the training crop on ADE20K in pixels; None on COCO."""
        return None if self.is_detection else self.size[1]

    @property
    def counted(self) -> frozenset[str]:
        """The `paper.flops.OPTIONAL_PARTS` that `gflops` include; else the default of `count_flops`."""
        return frozenset({'SyncBN'} if self.gflops else {'SyncBN', 'attention'})

    @property
    def backbone_identity(self) -> dict[str, object]:
        """The settings of the backbone and its training that identify the recipe of this result."""
        return {'model.backbone.arch': self.arch, 'model.backbone.drop_path_rate': self.drop_path_rate}

    @cached_property
    def identity(self) -> dict[str, object]:
        """The settings of a config, by dotted key, that identify the recipe of this result."""
        common = self.backbone_identity
        # A config with class names is for other data than COCO or ADE20K, even with the same number of classes.
        common |= {f'{split}_dataloader.dataset.metainfo': None for split in ('train', 'test')}
        folder = self.recipe.split('/')[0]
        if self.is_detection:
            model, num_classes = DETECTORS[folder]
            common |= {'model.type': model, 'train_dataloader.dataset.type': 'CocoDataset'}
            return common | {f'model.{num_classes}': 80}
        common |= {'model.decode_head.type': SEGMENTOR_HEADS[folder], 'train_dataloader.dataset.type': 'ADE20KDataset'}
        common |= {'model.data_preprocessor.size': (self.crop_size, self.crop_size)}
        return common | {'model.decode_head.num_classes': 150}


# By folder of the recipes: type of the detector and key of its number of classes; type of the segmentor's head.
DETECTORS = {
    'mask_rcnn': ('MaskRCNN', 'roi_head.mask_head.num_classes'),
    'cascade': ('CascadeRCNN', 'roi_head.mask_head.num_classes'),
    'rtmdet': ('RTMDet', 'bbox_head.num_classes'),
    'dino': ('DetrexDINO', 'bbox_head.num_classes'),
    'mask2former': ('Mask2Former', 'panoptic_head.num_things_classes'),
}
SEGMENTOR_HEADS = {'upernet': 'UPerHead', 'linear': 'LinearHead', 'mask2former': 'Mask2FormerHead'}


@dataclass(frozen=True)
class BaselineResult(PaperResult):
    """A result of a baseline of the paper: Swin, ResNet-50 or ResNeXt-101.

    `arch` is a key of `BASELINE_BACKBONES`; `decay_rate` is None without layer-wise lr decay.
    """

    @property
    def is_swin(self) -> bool:
        """Whether the backbone is a Swin, not a ResNet or ResNeXt."""
        return self.arch.startswith('swin')

    @property
    def weights(self) -> str:
        """Name of the pretrained weights of the backbone, or of their file without suffix."""
        if not self.is_swin:
            return RESNET_WEIGHTS[self.arch]
        return f'{self.arch}_patch4_window7_224{"_22k" if self.pretraining == "22k" else ""}'

    @property
    def released(self) -> str | None:
        """Name of the checkpoint that Swin's authors released; None if there is none."""
        if not self.is_swin or self.pretraining == '22k':
            return None
        model = self.recipe.split('/')[0].replace('cascade', 'cascade_mask_rcnn')
        return f'{model}_{self.arch}_patch4_window7{"" if self.is_detection else "_512x512"}'

    @property
    def counted(self) -> frozenset[str]:
        """Parts that `gflops` include. Swin's authors counted attention; ConvNeXt's, who counted Swin-L, did not."""
        if not self.is_swin:
            return super().counted
        return frozenset({'LayerNorm'} if self.arch == 'swin_large' else {'LayerNorm', 'attention'})

    @property
    def backbone_identity(self) -> dict[str, object]:
        """The settings of the backbone and its training that identify the recipe of this result."""
        settings = {f'model.backbone.{key}': value for key, value in BASELINE_BACKBONES[self.arch].items()}
        if self.is_swin:
            settings['model.backbone.drop_path_rate'] = self.drop_path_rate
        return settings | {'optim_wrapper.paramwise_cfg.decay_rate': self.decay_rate}


@dataclass(frozen=True)
class LaterResult(PaperResult):
    """A result of ConvNeXt or ConvNeXt V2 that was published after the paper.

    Attributes:
        source: Publication of the result; '' if it is unpublished.
        epochs: Length of a training on COCO; None for iteration-based trainings.
    """

    source: str = ''
    epochs: int | None = 36

    @property
    def released(self) -> str | None:
        """None, because whole models were not released in a usable form."""
        return None

    @property
    def backbone_identity(self) -> dict[str, object]:
        """The settings of the backbone and its training that identify the recipe of this result."""
        settings = super().backbone_identity | {'model.backbone.use_grn': True if 'v2' in self.recipe else None}
        if self.is_detection:
            settings |= {'total_batch': self.total_batch, 'train_cfg.max_epochs': self.epochs}
        if self.pretraining == 'DINOv3':
            settings['model.backbone.init_cfg.checkpoint'] = self.weights
        return settings


@dataclass(frozen=True)
class DINOResult(LaterResult):
    """A result of DINO with ConvNeXt by detrex, or a recipe beside it that nobody has trained: without metrics."""

    @property
    def released(self) -> str | None:
        """Name of the checkpoint that detrex released, of those from ImageNet-22K with 384; None of the untrained."""
        weights = '384' if self.pretraining == '22k' else '1k'
        return f'dino_convnext_{self.arch}_{weights}_4scale_12ep' if self.metrics else None

    @property
    def backbone_identity(self) -> dict[str, object]:
        """The settings of the backbone and its training that identify the recipe of this result."""
        settings = super().backbone_identity | {'optim_wrapper.paramwise_cfg.decay_rate': self.decay_rate}
        if self.pretraining == '22k':  # in nothing else it differs from the one from ImageNet-1K
            settings['model.backbone.init_cfg.checkpoint'] = self.weights
        return settings


SWIN_S = dict(depths=(2, 2, 18, 2), window_size=7)
BASELINE_BACKBONES = {
    'swin_tiny': dict(embed_dims=96, num_heads=(3, 6, 12, 24), depths=(2, 2, 6, 2), window_size=7),
    'swin_small': dict(embed_dims=96, num_heads=(3, 6, 12, 24), **SWIN_S),
    'swin_base': dict(embed_dims=128, num_heads=(4, 8, 16, 32), **SWIN_S),
    'swin_large': dict(embed_dims=192, num_heads=(6, 12, 24, 48), **SWIN_S),
    'resnet50': dict(type='ResNet', depth=50),
    'resnext101_32x4d': dict(type='ResNeXt', depth=101, groups=32, base_width=4),
    'resnext101_64x4d': dict(type='ResNeXt', depth=101, groups=64, base_width=4),
}
RESNET_WEIGHTS = {
    'resnet50': 'resnet50-0676ba61',
    'resnext101_32x4d': 'resnext101_32x4d-a5af3160',
    'resnext101_64x4d': 'resnext101_64x4d-ee2c6f71',
}


# fmt: off
PAPER_RESULTS = tuple(PaperResult(*row) for row in (
    # recipe, arch, weights, drop path, lr, decay rate, box AP/50/75 and mask AP/50/75, M parameters, GFLOPs
    ('mask_rcnn/convnext_t', 'tiny', '1k', 0.4, 1e-4, 0.95, (46.2, 67.9, 50.8, 41.7, 65.0, 44.9), 48, 262),
    ('cascade/convnext_t', 'tiny', '1k', 0.4, 2e-4, 0.7, (50.4, 69.1, 54.8, 43.7, 66.5, 47.3), 86, 741),
    ('cascade/convnext_s', 'small', '1k', 0.6, 2e-4, 0.7, (51.9, 70.8, 56.5, 45.0, 68.4, 49.1), 108, 827),
    ('cascade/convnext_b', 'base', '1k', 0.7, 2e-4, 0.8, (52.7, 71.3, 57.2, 45.6, 68.9, 49.5), 146, 964),
    ('cascade/convnext_b_in22k', 'base', '22k', 0.6, 1e-4, 0.8, (54.0, 73.1, 58.8, 46.9, 70.6, 51.3), 146, 964),
    ('cascade/convnext_l_in22k', 'large', '22k', 0.7, 1e-4, 0.7,
     (54.8, 73.8, 59.8, 47.6, 71.3, 51.7), 255, 1354, (1280, 800), 'float32'),
    ('cascade/convnext_xl_in22k', 'xlarge', '22k', 0.8, 1e-4, 0.7,
     (55.2, 74.2, 59.9, 47.7, 71.6, 52.2), 407, 1898, (1280, 800), 'float32'),
    # recipe, arch, weights, drop path, lr, decay rate, mIoU single scale and multi-scale, M parameters, GFLOPs, size
    ('upernet/convnext_t', 'tiny', '1k', 0.4, 1e-4, 0.9, (46.0, 46.7), 60, 939, (2048, 512)),
    ('upernet/convnext_s', 'small', '1k', 0.3, 1e-4, 0.9, (48.7, 49.6), 82, 1027, (2048, 512)),
    ('upernet/convnext_b', 'base', '1k', 0.4, 1e-4, 0.9, (49.1, 49.9), 122, 1170, (2048, 512)),
    ('upernet/convnext_b_in22k', 'base', '22k', 0.4, 1e-4, 0.9, (52.6, 53.1), 122, 1828, (2560, 640)),
    ('upernet/convnext_l_in22k', 'large', '22k', 0.4, 1e-4, 0.9, (53.2, 53.7), 235, 2458, (2560, 640), 'float32'),
    ('upernet/convnext_xl_in22k', 'xlarge', '22k', 0.4, 8e-5, 0.9, (53.6, 54.0), 391, 3335, (2560, 640), 'float32'),
))
# Tables 3 and 4 as well. Lr and drop path of the two Cascade Swin-22K are this project's choice, since nobody published
# them; parameters that the paper leaves out, and mIoU of a single scale, are those of Swin's paper and READMEs.
BASELINE_RESULTS = tuple(BaselineResult(*row) for row in (
    ('mask_rcnn/swin_t', 'swin_tiny', '1k', 0.2, 1e-4, None, (46.0, 68.1, 50.3, 41.6, 65.1, 44.9), 48, 267),
    ('cascade/resnet50', 'resnet50', '1k', 0, 1e-4, None, (46.3, 64.3, 50.5, 40.1, 61.7, 43.4), 82, 739),
    ('cascade/resnext101_32x4d', 'resnext101_32x4d', '1k', 0, 1e-4, None,
     (48.1, 66.5, 52.4, 41.6, 63.9, 45.2), 101, 819),
    ('cascade/resnext101_64x4d', 'resnext101_64x4d', '1k', 0, 1e-4, None,
     (48.3, 66.4, 52.3, 41.7, 64.0, 45.1), 140, 972),
    ('cascade/swin_t', 'swin_tiny', '1k', 0.2, 1e-4, None, (50.4, 69.2, 54.7, 43.7, 66.6, 47.3), 86, 745),
    ('cascade/swin_s', 'swin_small', '1k', 0.2, 1e-4, None, (51.9, 70.7, 56.3, 45.0, 68.2, 48.8), 107, 838),
    ('cascade/swin_b', 'swin_base', '1k', 0.3, 1e-4, None, (51.9, 70.5, 56.4, 45.0, 68.1, 48.9), 145, 982),
    ('cascade/swin_b_in22k', 'swin_base', '22k', 0.3, 1e-4, 0.9, (53.0, 71.8, 57.5, 45.8, 69.4, 49.7), 145, 982),
    ('cascade/swin_l_in22k', 'swin_large', '22k', 0.4, 1e-4, 0.9,
     (53.9, 72.4, 58.8, 46.7, 70.1, 50.8), None, 1382, (1280, 800), 'float32'),
    ('upernet/swin_t', 'swin_tiny', '1k', 0.3, 6e-5, None, (44.51, 45.8), 60, 945, (2048, 512), 'float32'),
    ('upernet/swin_s', 'swin_small', '1k', 0.3, 6e-5, None, (47.64, 49.5), 81, 1038, (2048, 512), 'float32'),
    ('upernet/swin_b', 'swin_base', '1k', 0.3, 6e-5, None, (48.13, 49.7), 121, 1188, (2048, 512), 'float32'),
    ('upernet/swin_b_in22k', 'swin_base', '22k', 0.3, 6e-5, None, (None, 51.7), 121, 1841, (2560, 640), 'float32'),
    ('upernet/swin_l_in22k', 'swin_large', '22k', 0.3, 6e-5, None, (None, 53.5), 234, 2468, (2560, 640), 'float32'),
))

VMAMBA, CONVNEXT_V2, MMDET = "VMamba's table", "ConvNeXt V2's table", "mmdet's README"
MASK2FORMER, DINOV3 = "Mask2Former's PR #34", "DINOv3's model card"
DINOV3_SIZES = {'t': 'tiny', 's': 'small', 'b': 'base', 'l': 'large'}
LSJ = dict(total_batch=32, source=CONVNEXT_V2)
# Where a source does not say what was chosen, drop path, lr and decay rate are this project's choice: each recipe says
# so. Metrics that a source leaves out are None.
LATER_RESULTS = (
    LaterResult('mask_rcnn/convnext_s', 'small', '1k', 0.6, 1e-4, 0.95, (47.9, None, None, 42.9, None, None), 70, 348,
                source=VMAMBA),
    LaterResult('mask_rcnn/convnext_t_1x', 'tiny', '1k', 0.2, 1e-4, 0.95, (44.2, None, None, 40.1, None, None), 48, 262,
                source=VMAMBA, epochs=12),
    LaterResult('mask_rcnn/convnext_s_1x', 'small', '1k', 0.3, 1e-4, 0.95, (45.4, None, None, 41.8, None, None),
                70, 348, source=VMAMBA, epochs=12),
    LaterResult('mask_rcnn/convnext_b_1x', 'base', '1k', 0.4, 1e-4, 0.95, (47.0, None, None, 42.7, None, None),
                108, 486, source=VMAMBA, epochs=12),
    LaterResult('mask_rcnn/convnext_b_lsj', 'base', '1k', 0.4, 1e-4, 0.95, (50.3, 71.6, 56.1, 44.9, 68.5, 48.8),
                None, 486, **LSJ),
    LaterResult('mask_rcnn/convnext_l_lsj', 'large', '1k', 0.4, 1e-4, 0.95, (50.6, 71.5, 56.3, 45.1, 68.7, 49.2),
                None, 875, weights_name='convnext_large_1k_224_ema', **LSJ),
    LaterResult('mask_rcnn/convnextv2_b_lsj', 'base', '1k', 0.4, 1e-4, 0.95, (52.9, 72.6, 58.9, 46.6, 70.0, 51.1),
                None, 486, weights_name='convnextv2_base_1k_224_fcmae', **LSJ),
    LaterResult('mask_rcnn/convnextv2_l_lsj', 'large', '1k', 0.4, 1e-4, 0.95, (54.4, 73.9, 60.4, 47.7, 71.4, 52.3),
                None, 875, weights_name='convnextv2_large_1k_224_fcmae', **LSJ),
    LaterResult('mask_rcnn/convnextv2_h_lsj', 'huge', '1k', 0.4, 1e-4, 0.95, (55.7, 75.2, 61.8, 48.9, 72.8, 53.6),
                None, 2525, weights_name='convnextv2_huge_1k_224_fcmae', **LSJ),
    LaterResult('rtmdet/convnext_b', 'base', '22k', 0.7, 1e-3, 0.8, (53.1, None, None, None, None, None), None, None,
                (640, 640), 'float32', 128, 'convnext_base_22k_1k_384', MMDET, 100),
    LaterResult('upernet/convnext_l', 'large', '1k', 0.4, 1e-4, 0.9, (None, 50.5), 235, 1573, (2048, 512),
                weights_name='convnext_large_1k_224_ema', source=CONVNEXT_V2),
    LaterResult('upernet/convnextv2_b', 'base', '1k', 0.3, 1e-4, 0.9, (None, 52.1), 122, 1170, (2048, 512),
                weights_name='convnextv2_base_1k_224_ema', source=CONVNEXT_V2),
    LaterResult('upernet/convnextv2_l', 'large', '1k', 0.4, 1e-4, 0.9, (None, 53.7), 235, 1573, (2048, 512),
                weights_name='convnextv2_large_1k_224_ema', source=CONVNEXT_V2),
    LaterResult('upernet/convnextv2_h', 'huge', '1k', 0.4, 1e-4, 0.9, (None, 55.0), 707, 3272, (2048, 512),
                weights_name='convnextv2_huge_1k_224_ema', source=CONVNEXT_V2),
    LaterResult('upernet/convnextv2_h_in22k', 'huge', '22k', 0.4, 1e-4, 0.9, (None, 57.0), 707, 5113, (2560, 640),
                weights_name='convnextv2_huge_22k_384_ema', source=CONVNEXT_V2),
    LaterResult('mask2former/convnext_b_in22k_ade20k', 'base', '22k', 0.4, 4e-4, None, (55.06, None), None, None,
                (2560, 640), 'float32', 64, 'convnext_base_22k_1k_384', MASK2FORMER),
    *(
        LaterResult(f'linear/dinov3_convnext_{letter}', DINOV3_SIZES[letter], 'DINOv3', 0.0, 1e-3, None, (miou, None),
                    size=(2048, 512), precision='float32', source=DINOV3)
        for letter, miou in dict(t=42.7, s=44.8, b=46.3, l=47.8).items()
    ),
)
# DINO-4scale as detrex trained it, and the same with layer decay and stochastic depth, which nobody has trained: end of
# the recipe, arch, weights and their name, box AP of the first, drop path and decay rate of the second.
DINO_ROWS = (
    ('t', 'tiny', '1k', 'convnext_tiny_1k_224_ema', 51.4, 0.4, 0.7),
    ('s', 'small', '1k', 'convnext_small_1k_224_ema', 52.0, 0.6, 0.7),
    ('b', 'base', '1k', 'convnext_base_1k_384', 52.6, 0.7, 0.8),
    ('l', 'large', '1k', 'convnext_large_1k_384', 53.4, 0.7, 0.7),
    ('t_in22k', 'tiny', '22k', 'convnext_tiny_22k_1k_384', 52.4, 0.4, 0.7),
    ('s_in22k', 'small', '22k', 'convnext_small_22k_1k_384', 54.2, 0.6, 0.7),
    ('b_in22k', 'base', '22k', 'convnext_base_22k_1k_384', 55.1, 0.6, 0.8),
    ('l_in22k', 'large', '22k', 'convnext_large_22k_1k_384', 55.5, 0.7, 0.7),
)
DINO = dict(precision='float32', source="detrex's README", epochs=None)
NO_MORE, UNTRAINED = (None,) * 5, (None,) * 6
DINO_RESULTS = (
    *(
        DINOResult(f'dino/convnext_{name}', arch, pretraining, 0.0, 1e-4, None, (box_ap, *NO_MORE),
                   weights_name=weights, **DINO)
        for name, arch, pretraining, weights, box_ap, _, _ in DINO_ROWS
    ),
    *(
        DINOResult(f'dino/convnext_{name}_layer_decay', arch, pretraining, drop_path, 1e-4, decay_rate, UNTRAINED,
                   weights_name=weights, **DINO)
        for name, arch, pretraining, weights, _, drop_path, decay_rate in DINO_ROWS
    ),
)
# Recipes whose combination of backbone, weights and head nobody published a result of.
UNTRAINED_RESULTS = (
    LaterResult('mask2former/convnext_b_in22k_coco', 'base', '22k', 0.6, 1e-4, 0.8, UNTRAINED, precision='float32',
                weights_name='convnext_base_22k_1k_384', epochs=None),
    *(
        DINOResult(f'dino/dinov3_convnext_{letter}', arch, 'DINOv3', 0.0, 1e-4, None, UNTRAINED, precision='float32',
                   epochs=None)
        for letter, arch in DINOV3_SIZES.items()
    ),
    *(
        LaterResult(f'upernet/dinov3_convnext_{letter}', DINOV3_SIZES[letter], 'DINOv3', drop_path, 1e-4, 0.9,
                    (None, None), size=(2048, 512))
        for letter, drop_path in dict(t=0.4, s=0.3, b=0.4, l=0.4).items()
    ),
)
# fmt: on
RESULTS = PAPER_RESULTS + BASELINE_RESULTS + LATER_RESULTS + DINO_RESULTS + UNTRAINED_RESULTS


def to_paper_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Convert the results of an evaluator to the paper's metrics.

    Args:
        metrics: Results by the keys of mmdet's `CocoMetric` or mmseg's `IoUMetric`.

    Returns:
        Metrics in percent by the paper's names; other metrics are dropped.
    """
    values = {name: (metrics.get(key), factor) for name, (key, factor) in EVALUATOR_KEYS.items()}
    return {name: factor * value for name, (value, factor) in values.items() if value is not None}


def find_paper_result(config: Config) -> PaperResult | None:
    """Return the paper's result whose recipe a config is, from whatever file; None if it is not a recipe."""
    # Later results have more specific settings, so they come first.
    results = (r for r in reversed(RESULTS) if all(_has(config, *setting) for setting in r.identity.items()))
    return next(results, None)


def _has(config: Config, key: str, expected: object) -> bool:
    value = get_dotted(config, key)
    if key.endswith('.checkpoint'):  # in any folder
        value, expected = (PurePath(str(name)).name.removesuffix('.pth') for name in (value, expected))
    return is_equal(short_name(value) if key.endswith('.type') else value, expected)
