"""The recipes are mmdet's and mmseg's own ConvNeXt and Swin configs, but for the differences that are written here.

So are the base configs of the embedded data set those of COCO and ADE20K.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import mmdet
import mmseg
import pytest
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import Runner
from mmseg.datasets import ADE20KDataset
from mmseg.models import EncoderDecoder

from convnext_dense.datasets import toy_shapes
from convnext_dense.models.convnext import ARCHS
from convnext_dense.paper.results import BASELINE_RESULTS, LATER_RESULTS, PAPER_RESULTS, TOTAL_BATCH, PaperResult
from helpers.paths import ROOT

# What a run is made of: all that mmengine's Runner reads, what is imported first, and the batch that we keep.
PARTS = [*inspect.signature(Runner).parameters, 'custom_imports', 'total_batch']
SPLITS = ('train', 'val', 'test')
ABSENT = 'absent'

# Arguments that one side writes out and the other leaves to the class: no difference where the value is the default.
DEFAULTS = {
    **{f'{split}_dataloader.dataset.pipeline.0.backend_args': LoadImageFromFile for split in SPLITS},
    'optim_wrapper.loss_scale': AmpOptimWrapper,
}
COCO_DEFAULTS = {
    **DEFAULTS,
    **{f'{split}_dataloader.dataset.backend_args': CocoDataset for split in SPLITS},
    **{f'{split}_evaluator.{name}': CocoMetric for split in SPLITS for name in ('backend_args', 'format_only')},
}
ADE20K_DEFAULTS = {
    **DEFAULTS,
    **{f'{split}_dataloader.dataset.reduce_zero_label': ADE20KDataset for split in SPLITS},
    'model.pretrained': EncoderDecoder,
}

# From here on: key -> (stock, ours).
COMMON = {
    'model.backbone.type': ('mmpretrain.ConvNeXt', 'ConvNeXt'),  # ours needs no mmpretrain
    'model.backbone.gap_before_final_norm': (False, ABSENT),  # of mmpretrain's classifiers
    'model.backbone.init_cfg.prefix': ('backbone.', ABSENT),  # of mmpretrain's files; ours are the authors'
    # Ours finds the number of layers by the depths.
    'optim_wrapper.constructor': ('LearningRateDecayOptimizerConstructor', 'LayerDecayOptimWrapperConstructor'),
    'total_batch': (ABSENT, TOTAL_BATCH),  # tools/train.py keeps the batch, instead of scaling the lr with it
}
COCO = {
    **COMMON,
    'custom_imports.imports': (['mmpretrain.models'], ['convnext_dense', 'convnext_dense.models.fp32_heads']),
    'auto_scale_lr.enable': (False, ABSENT),
    'auto_scale_lr.base_batch_size': (TOTAL_BATCH, ABSENT),
    # The original warmed up for 500 iterations, and mmengine counts `end - begin - 1`.
    'param_scheduler.0.end': (1000, 501),
    # Under mixed precision proposals, RoIs, their features and losses stay in fp32, as in the original.
    'model.rpn_head.type': ('RPNHead', 'FP32RPNHead'),
    'model.roi_head.bbox_roi_extractor.type': ('SingleRoIExtractor', 'FP32RoIExtractor'),
    'model.roi_head.mask_roi_extractor.type': ('SingleRoIExtractor', 'FP32RoIExtractor'),
    'model.roi_head.mask_head.type': ('FCNMaskHead', 'FP32FCNMaskHead'),
}
MASK_RCNN = {**COCO, 'model.roi_head.bbox_head.type': ('Shared2FCBBoxHead', 'FP32Shared2FCBBoxHead')}
CASCADE = {
    **COCO,
    **{f'model.roi_head.bbox_head.{i}.type': ('ConvFCBBoxHead', 'FP32ConvFCBBoxHead') for i in range(3)},
}
ADE20K = {
    **COMMON,
    'custom_imports.imports': ('mmpretrain.models', ['convnext_dense']),
    # The original's two schedules both start at 0 and multiply; the ones as above.
    'param_scheduler.0.end': (1500, 1501),
    'param_scheduler.1.begin': (1500, 0),
    'param_scheduler.1.end': (160000, 160001),
    # Without and with the slash at the end.
    **{
        f'{split}_dataloader.dataset.data_root': ('data/ade/ADEChallengeData2016', 'data/ade/ADEChallengeData2016/')
        for split in SPLITS
    },
    # Ours says it to the data set, which tells the pipeline: mmseg calls the other way deprecated.
    'train_dataloader.dataset.pipeline.1.reduce_zero_label': (True, ABSENT),
    'val_dataloader.dataset.pipeline.2.reduce_zero_label': (True, ABSENT),
    'test_dataloader.dataset.pipeline.2.reduce_zero_label': (True, ABSENT),
    # How many iterations a line of the log averages: 50 as on COCO; by default 10.
    'log_processor.type': (ABSENT, 'LogProcessor'),
    'log_processor.window_size': (ABSENT, 50),
}
CASCADE_OF = 'cascade-mask-rcnn_convnext-{}-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco'
UPERNET_OF = 'convnext-{0}_upernet_8xb2-amp-160k_ade20k-{1}x{1}'
TINY = 'convnext-tiny_3rdparty_32xb128-noema_in1k_20220301-795e9634.pth'
SMALL = 'convnext-small_3rdparty_32xb128-noema_in1k_20220301-303e75e3.pth'
BASE = 'convnext-base_3rdparty_32xb128-noema_in1k_20220301-2a0ee547.pth'
# recipe -> stock config, its weights, differences that all recipes of the model have.
STOCK = {
    'mask_rcnn/convnext_t': ('mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco', TINY, MASK_RCNN),
    'cascade/convnext_t': (CASCADE_OF.format('t'), TINY, CASCADE),
    # mmdet has no larger ones.
    **{
        f'cascade/convnext_{size}': (CASCADE_OF.format('s'), SMALL, CASCADE)
        for size in ('s', 'b', 'b_in22k', 'l_in22k', 'xl_in22k')
    },
    'upernet/convnext_t': (UPERNET_OF.format('tiny', 512), TINY, ADE20K),
    'upernet/convnext_s': (UPERNET_OF.format('small', 512), SMALL, ADE20K),
    'upernet/convnext_b': (UPERNET_OF.format('base', 512), BASE, ADE20K),
    **{
        f'upernet/convnext_{size}_in22k': (
            UPERNET_OF.format(arch, 640),
            f'convnext-{arch}_3rdparty_in21k_20220301-{sha}.pth',
            ADE20K,
        )
        for size, arch, sha in (('b', 'base', '262fd037'), ('l', 'large', 'e6e0ea0a'), ('xl', 'xlarge', '08aa5ddc'))
    },
}


# The Swin recipes that mmdet or mmseg has too: they leave out what is the default of the class.
SWIN = {
    **{
        f'model.backbone.{name}': (default, ABSENT)
        for name, default in dict(qk_scale=None, drop_rate=0.0, attn_drop_rate=0.0).items()
    },
    'model.backbone.type': ('SwinTransformer', 'StrictSwinTransformer'),  # whose weights load completely or not at all
    'total_batch': COMMON['total_batch'],
    'custom_imports.allow_failed_imports': (ABSENT, False),
}
NOT_CONVNEXT = [key for key in COMMON if key.startswith(('model.backbone', 'optim_wrapper'))]
SWIN_COCO = {
    **{key: pair for key, pair in MASK_RCNN.items() if key not in NOT_CONVNEXT},
    **SWIN,
    'model.backbone.with_cp': (False, ABSENT),
    'model.backbone.convert_weights': (True, ABSENT),  # ours finds out by the names
    'custom_imports.imports': (
        ABSENT,
        ['convnext_dense', 'convnext_dense.models.fp32_heads', 'convnext_dense.models.swin_detection'],
    ),
}
SWIN_ADE20K = {
    **{key: pair for key, pair in ADE20K.items() if key not in NOT_CONVNEXT},
    **SWIN,
    **{
        f'model.backbone.{name}': (default, ABSENT)
        for name, default in {
            'pretrain_img_size': 224,
            'patch_size': 4,
            'strides': (4, 2, 2, 2),
            'use_abs_pos_embed': False,
            'act_cfg.type': 'GELU',
            'norm_cfg.type': 'LN',
            'norm_cfg.requires_grad': True,
        }.items()
    },
    'custom_imports.imports': (ABSENT, ['convnext_dense', 'convnext_dense.models.swin_segmentation']),
}
LARGER_CROPS = {  # mmseg has the 22K rows at 512 alone
    'model.data_preprocessor.size': ((512, 512), (640, 640)),
    'train_dataloader.dataset.pipeline.2.scale': ((2048, 512), (2560, 640)),
    'train_dataloader.dataset.pipeline.3.crop_size': ((512, 512), (640, 640)),
    **{f'{split}_dataloader.dataset.pipeline.1.scale': ((2048, 512), (2560, 640)) for split in ('val', 'test')},
}
SWIN_UPERNET_OF = 'swin-{}-patch4-window7-in{}k-pre_upernet_8xb2-160k_ade20k-512x512'
SWIN_STOCK = {
    'mask_rcnn/swin_t': ('mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco', 'swin_tiny_patch4_window7_224', SWIN_COCO),
    **{
        f'upernet/swin_{size[0]}{"_in22k" if k == 22 else ""}': (
            SWIN_UPERNET_OF.format(size, k),
            f'swin_{size}_patch4_window7_224{"_22k" if k == 22 else ""}_{sha}',
            SWIN_ADE20K | (LARGER_CROPS if k == 22 else {}),
        )
        for size, k, sha in (
            ('tiny', 1, '20220317-1cdeb081'),
            ('small', 1, '20220317-7ba6d6dd'),
            ('base', 1, '20220317-e9b98025'),
            ('base', 22, '20220317-4f79f7c0'),
            ('large', 22, '20220412-aeecf2aa'),
        )
    },
}


def expected_differences(result: PaperResult) -> dict[str, tuple]:
    """The differences of a recipe from its stock config: key -> (stock, ours)."""
    stock, weights, common = STOCK[result.recipe]
    expected = {
        **common,
        'model.backbone.init_cfg.checkpoint': (weights, result.weights),
        'optim_wrapper.paramwise_cfg.num_layers': (6 if result.arch == 'tiny' else 12, ABSENT),
    }
    if result.precision == 'float32':  # as the original trained the two largest
        expected['optim_wrapper.type'] = ('AmpOptimWrapper', 'OptimWrapper')
    if stock == CASCADE_OF.format('s'):  # from the stock Cascade S to another size
        expected |= {
            'model.backbone.arch': ('small', result.arch),
            'model.neck.in_channels': ([96, 192, 384, 768], list(ARCHS[result.arch]['channels'])),
            'model.backbone.drop_path_rate': (0.6, result.drop_path_rate),
            'optim_wrapper.optimizer.lr': (2e-4, result.lr),
            'optim_wrapper.paramwise_cfg.decay_rate': (0.7, result.decay_rate),
        }
    return {
        key: (stock_value, our_value) for key, (stock_value, our_value) in expected.items() if stock_value != our_value
    }


@pytest.fixture(autouse=True)
def default_data_root(monkeypatch):
    for name in ('COCO_ROOT', 'ADE20K_ROOT', 'SHAPES_ROOT'):
        monkeypatch.delenv(name, raising=False)


def flatten(value, key: str = '') -> dict[str, object]:
    """Nested dicts and lists of them as one dict by dotted keys; lists of plain values, and what is empty, whole."""
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, (list, tuple)) and any(isinstance(v, (dict, list, tuple)) for v in value):
        items = enumerate(value)
    else:
        return {key: value}
    return {k: v for name, item in items for k, v in flatten(item, f'{key}.{name}'.lstrip('.')).items()}


def settings(file: Path, defaults: Mapping[str, type] = MappingProxyType({})) -> dict[str, object]:
    """A config's settings by dotted key, without those that merely repeat a default."""
    config = Config.fromfile(file, import_custom_modules=False).to_dict()
    flat_config = flatten({part: config[part] for part in PARTS if part in config})
    for key, owner in defaults.items():
        default = inspect.signature(owner).parameters[key.split('.')[-1]].default
        if key in flat_config and flat_config[key] == default:
            del flat_config[key]
    return flat_config


def differences(stock: dict, recipe: dict) -> dict[str, tuple]:
    pairs = {key: (stock.get(key, ABSENT), recipe.get(key, ABSENT)) for key in {**stock, **recipe}}
    return {
        key: (stock_value, our_value) for key, (stock_value, our_value) in pairs.items() if stock_value != our_value
    }


@pytest.mark.parametrize('result', PAPER_RESULTS, ids=lambda result: result.recipe)
def test_differences_from_the_stock_config(result):
    stock, recipe = stock_and_ours(result, f'convnext/{STOCK[result.recipe][0]}.py')
    assert differences(stock, recipe) == expected_differences(result)


@pytest.mark.parametrize('result', [r for r in BASELINE_RESULTS if r.recipe in SWIN_STOCK], ids=lambda r: r.recipe)
def test_differences_of_swin_from_the_stock_config(result):
    """Cascade Mask R-CNN with Swin is in neither: test_baselines.py compares it with the original."""
    name, weights, expected = SWIN_STOCK[result.recipe]
    stock, recipe = stock_and_ours(result, f'swin/{name}.py')
    expected = expected | {'model.backbone.init_cfg.checkpoint': (f'{weights}.pth', result.weights)}
    assert differences(stock, recipe) == expected


def test_differences_of_rtmdet_from_the_stock_config():
    result = next(result for result in LATER_RESULTS if result.recipe == 'rtmdet/convnext_b')
    stock, recipe = stock_and_ours(result, 'rtmdet/rtmdet_l_convnext_b_4xb32-100e_coco.py')
    expected = {
        **COMMON,
        'total_batch': (ABSENT, 128),
        'auto_scale_lr.enable': (False, ABSENT),
        'auto_scale_lr.base_batch_size': (16, ABSENT),
        'custom_imports.imports': (['mmpretrain.models'], ['convnext_dense']),
        'model.backbone.init_cfg.checkpoint': (
            'convnext-base_in21k-pre-3rdparty_in1k-384px_20221219-4570f792.pth',
            'convnext_base_22k_1k_384',
        ),
        'optim_wrapper.paramwise_cfg.num_layers': (12, ABSENT),
        # What ours does without being told.
        'optim_wrapper.paramwise_cfg.norm_decay_mult': (0, ABSENT),
        'optim_wrapper.paramwise_cfg.bias_decay_mult': (0, ABSENT),
        'optim_wrapper.paramwise_cfg.bypass_duplicate': (True, ABSENT),
        'custom_hooks.1.switch_pipeline.0.backend_args': (None, ABSENT),
    }
    assert differences(stock, recipe) == expected


def stock_and_ours(result: PaperResult, stock_file: str) -> tuple[dict, dict]:
    package, defaults = (mmdet, COCO_DEFAULTS) if result.is_detection else (mmseg, ADE20K_DEFAULTS)
    stock = settings(Path(package.__path__[0], '.mim/configs', stock_file), defaults)
    recipe = settings(ROOT / 'configs' / f'{result.recipe}.py', defaults)
    # The mirror that a release of mmdet or mmseg downloads from is its own business.
    place = 'model.backbone.init_cfg.checkpoint'
    stock[place] = PurePosixPath(stock[place]).name
    # mmseg writes the preprocessor a second time, for models that have none.
    for key in [key for key in stock if key.startswith('data_preprocessor.')]:
        assert stock.pop(key) == stock[f'model.{key}']
    return stock, recipe


def test_differences_of_toy_detection_from_coco():
    """Data and classes of its own, smaller, in one process."""
    sides = [(96, 128), (112, 128), (128, 128)]
    choice = 'train_dataloader.dataset.pipeline.3.transforms'
    expected = {
        f'{choice}.0.0.scales': sides,
        f'{choice}.1.0.scales': sides[1:],
        f'{choice}.1.1.crop_size': (80, 112),
        f'{choice}.1.2.scales': sides,
    }
    for split, of in zip(SPLITS, ('train', 'val', 'val')):
        expected |= {
            f'{split}_dataloader.num_workers': 1,
            f'{split}_dataloader.dataset.data_root': 'data/shapes/',
            f'{split}_dataloader.dataset.metainfo.classes': toy_shapes.CLASSES,
            f'{split}_dataloader.dataset.ann_file': f'annotations/instances_{of}.json',
            f'{split}_dataloader.dataset.data_prefix.img': f'{of}/',
        }
    for split in ('val', 'test'):
        expected[f'{split}_dataloader.dataset.pipeline.1.scale'] = (128, 128)
        expected[f'{split}_evaluator.ann_file'] = 'data/shapes/annotations/instances_val.json'
    coco = settings(ROOT / 'configs/_base_/coco.py')
    shared = {key: value for key, value in coco.items() if '.scales.' not in key and key != 'total_batch'}
    assert settings(ROOT / 'configs/_base_/shapes_detection.py') == shared | flatten(expected)


def test_differences_of_toy_segmentation_from_ade20k():
    """Data and classes of its own, smaller, in one process."""
    expected = {
        'train_dataloader.batch_size': 8,
        'train_dataloader.dataset.pipeline.2.scale': (512, 128),
        'train_dataloader.dataset.pipeline.3.crop_size': (128, 128),
        'val_dataloader.dataset.pipeline.1.scale': (512, 128),
        'test_dataloader.dataset.pipeline.1.scale': (512, 128),
    }
    for split, of in zip(SPLITS, ('train', 'val', 'val')):
        expected |= {
            f'{split}_dataloader.num_workers': 1,
            f'{split}_dataloader.dataset.type': 'BaseSegDataset',
            f'{split}_dataloader.dataset.data_root': 'data/shapes/',
            f'{split}_dataloader.dataset.img_suffix': '.png',
            f'{split}_dataloader.dataset.metainfo.classes': toy_shapes.LABEL_NAMES,
            f'{split}_dataloader.dataset.metainfo.palette': toy_shapes.PALETTE,
            f'{split}_dataloader.dataset.data_prefix.img_path': of,
            f'{split}_dataloader.dataset.data_prefix.seg_map_path': f'labels/{of}',
        }
    shared = settings(ROOT / 'configs/_base_/ade20k.py')
    del shared['total_batch']
    assert settings(ROOT / 'configs/_base_/shapes_segmentation.py') == shared | flatten(expected)


@pytest.mark.parametrize(
    'base, recipe', [('cascade_mask_rcnn_3x', 'cascade/convnext_t'), ('upernet_160k', 'upernet/convnext_t')]
)
def test_base_configs_equal_convnext_t(base, recipe):
    """What a base says and each recipe says again is, where a config of somebody's own leaves it, Tiny's."""
    base_settings, tiny = settings(ROOT / f'configs/_base_/{base}.py'), settings(ROOT / f'configs/{recipe}.py')
    assert {key: tiny.get(key, ABSENT) for key in base_settings} == base_settings
