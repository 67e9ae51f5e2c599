"""Configs of other projects on custom data: types with a scope, as classes, derived; wrapped data sets; heads of every
kind. And YAML and JSON configs, which must not execute code."""

import re
from pathlib import Path

import mmdet
import mmseg
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset, MultiImageMixDataset
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize
from mmdet.evaluation import CocoMetric
from mmdet.models import SOLO
from mmengine.config import Config
from mmengine.dataset import RepeatDataset
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, OPTIM_WRAPPERS, TRANSFORMS, init_default_scope

from convnext_dense.config.batch_size import scale_batch
from convnext_dense.config.channels import adapt_input_channels
from convnext_dense.config.evaluation import set_prediction_output
from convnext_dense.config.preflight import check_backbones
from convnext_dense.config.recipe import training_precision
from convnext_dense.config.training import set_checkpoint_retention, set_precision
from convnext_dense.config.tree import iter_dicts
from convnext_dense.datasets import toy_shapes
from convnext_dense.datasets.configure import apply_dataset, check_classes, set_num_classes
from convnext_dense.datasets.custom import DatasetRequest, apply_custom_data
from convnext_dense.datasets.diagnostics import Report
from convnext_dense.datasets.image_sizes import resize_limits
from convnext_dense.datasets.request import CheckedDataset
from convnext_dense.engine.runner import _mmengine_class_name
from convnext_dense.errors import UsageError
from convnext_dense.models.convnext import ConvNeXt
from convnext_dense.paper.flops import build_on_meta
from convnext_dense.paper.results import find_paper_result
from convnext_dense.type_names import class_of, is_type, short_name
from helpers.paths import ROOT
from helpers.recipes import load as read_recipe
from helpers.tools import one_line_error

CONFIGS = ROOT / 'configs'


@METRICS.register_module()
class BoxMetric(CocoMetric):
    """A user's metric, derived from mmdet's."""


@OPTIM_WRAPPERS.register_module()
class OwnAmpWrapper(AmpOptimWrapper):
    pass


@MODELS.register_module()
class OwnConvNeXt(ConvNeXt):
    def __init__(self, extra=1, **kwargs):
        super().__init__(**kwargs)


def load(name):
    config = read_recipe(name)
    config.launcher, config.work_dir = 'none', 'run'
    return config


@pytest.fixture(scope='module')
def toy_dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp('drawn') / 'shapes'
    toy_shapes.write(folder, train=5, val=3, size=64)
    return folder


PATH = 'mmdet.evaluation.metrics.coco_metric.CocoMetric'  # mmengine's dump of a class


@pytest.mark.parametrize('kind', ['CocoMetric', 'mmdet.CocoMetric', CocoMetric, PATH, 'BoxMetric', BoxMetric])
def test_class_of_every_spelling(kind):
    init_default_scope('mmdet')
    assert is_type(kind, METRICS, 'CocoMetric') and not is_type(kind, METRICS, 'IoUMetric', 'VOCMetric')
    assert issubclass(class_of(kind), CocoMetric)


def test_short_name():
    assert short_name(PATH) == short_name(CocoMetric) == short_name('mmdet.CocoMetric') == 'CocoMetric'
    assert short_name('mmpretrain.ConvNeXt') == 'mmpretrain.ConvNeXt'  # another class than ours
    assert short_name(None) is None and short_name(BoxMetric) == 'test_config_types.BoxMetric'
    init_default_scope('mmdet')
    assert class_of('NoSuchThing') is None and not is_type('NoSuchThing', METRICS, 'CocoMetric')
    assert is_type('CocoMetric', HOOKS, 'CocoMetric')  # by its name where it is not registered
    for kind in ('CheckpointHook', 'mmengine.CheckpointHook', CheckpointHook):
        assert _mmengine_class_name(kind) == 'CheckpointHook'
    assert (
        _mmengine_class_name('mmengine.IterBasedTrainLoop') == 'IterBasedTrainLoop'
        and _mmengine_class_name('YOLOXModeSwitchHook') is None
    )


SPELLINGS = {
    'scoped': ('mmdet.CocoMetric', 'mmdet.LoadAnnotations', 'mmcv.LoadImageFromFile', 'mmdet.CocoDataset'),
    'classes': (CocoMetric, LoadAnnotations, LoadImageFromFile, CocoDataset),
    'derived': ('BoxMetric', LoadAnnotations, LoadImageFromFile, 'CocoDataset'),
}


@pytest.mark.parametrize('spelling', SPELLINGS)
@pytest.mark.parametrize('masks', [True, False])
def test_custom_data_with_every_spelling_of_types(toy_dataset, tmp_path, monkeypatch, spelling, masks):
    monkeypatch.chdir(tmp_path)
    metric, annotations, image, dataset = SPELLINGS[spelling]
    config = load('demo/mask_rcnn')
    for split in ('train', 'val', 'test'):
        data = config[f'{split}_dataloader'].dataset
        data.type = dataset
        for step in data.pipeline:
            step.type = {'LoadAnnotations': annotations, 'LoadImageFromFile': image}.get(step.type, step.type)
    config.val_evaluator = dict(type=metric, metric=('bbox', 'segm'))
    config.test_evaluator = [dict(type=metric, metric=['bbox', 'segm'], ann_file='theirs.json')]
    if not masks:
        monkeypatch.setattr('convnext_dense.datasets.check_coco.most_have_masks', lambda *args: False)
    apply_custom_data(config, DatasetRequest(str(toy_dataset)))
    for evaluator, split in ((config.val_evaluator, 'val'), (config.test_evaluator[0], 'val')):
        assert evaluator.ann_file == str(tmp_path / f'run/data/{split}.json')
        assert list(evaluator.metric) == (['bbox', 'segm'] if masks else ['bbox'])
    step = next(s for s in config.train_dataloader.dataset.pipeline if s.type == annotations)
    assert step.with_mask == masks
    sample = DATASETS.build(config.train_dataloader.dataset)[0]
    assert ('masks' in sample['data_samples'].gt_instances) == masks


def test_commands_with_every_spelling_of_types():
    for kind in ('AmpOptimWrapper', 'mmengine.AmpOptimWrapper', AmpOptimWrapper, 'OwnAmpWrapper'):
        config = load('demo/mask_rcnn')
        config.optim_wrapper.type = kind
        with pytest.raises(UsageError, match='mixed precision .* needs a GPU'):
            set_precision(config, None)
    assert (
        training_precision(Config(dict(optim_wrapper=dict(type='mmengine.AmpOptimWrapper', dtype='bfloat16'))))
        == 'bfloat16'
    )
    for kind in ('mmdet.CocoMetric', CocoMetric, 'BoxMetric'):
        config = load('demo/mask_rcnn')
        config.val_evaluator = dict(type=kind, metric='bbox')
        set_checkpoint_retention(config, 2)
        assert config.default_hooks.checkpoint.save_best == 'coco/bbox_mAP'
    config = load('demo/upernet')
    config.test_evaluator = [dict(type='mmengine.DumpResults', out_file_path='x.pkl'), dict(type='mmseg.IoUMetric')]
    set_prediction_output(config, 'maps')
    assert config.test_evaluator[1].output_dir == 'maps' and 'output_dir' not in config.test_evaluator[0]
    config = load('cascade/convnext_t')
    config.model.roi_head.bbox_head[0].norm_cfg.type = 'mmcv.SyncBN'
    config.model.roi_head.bbox_head = config.model.roi_head.bbox_head[:1]
    config.custom_hooks = [dict(type=EMAHook)]
    assert (
        'batch norm sees 2 images per iteration' in scale_batch(config, 1)[0] and config.custom_hooks[0].interval == 8
    )
    config = load('demo/upernet')
    config.train_dataloader.dataset.pipeline[0].type = LoadImageFromFile
    config.train_dataloader.dataset.pipeline[5].type = 'mmseg.PhotoMetricDistortion'
    config.model.backbone.in_channels = 1
    adapt_input_channels(config)
    assert config.train_dataloader.dataset.pipeline[0].color_type == 'grayscale'
    assert 'PhotoMetric' not in str(config.train_dataloader)


def test_derived_backbone_is_checked():
    init_default_scope('mmdet')
    for kind in ('OwnConvNeXt', OwnConvNeXt, 'convnext_dense.ConvNeXt'):
        extra = {} if kind == 'convnext_dense.ConvNeXt' else dict(extra=2)
        check_backbones(dict(backbone=dict(type=kind, arch='atto', **extra)))
        with pytest.raises(UsageError, match='tinny'):
            check_backbones(dict(module=dict(backbone=dict(type=kind, arch='tinny'))))


def test_paper_result_with_every_spelling_of_types():
    config = load('cascade/convnext_t')
    row = find_paper_result(config)
    config.model.type, config.train_dataloader.dataset.type = 'mmdet.CascadeRCNN', CocoDataset
    config.val_evaluator.type = PATH
    assert row is not None and find_paper_result(config) is row
    config.model.type = 'mmpretrain.CascadeRCNN'
    assert find_paper_result(config) is None


# ---- data sets within others ----------------------------------------------------------------------------------------


def wrap_train_dataset(config, **wrapper):
    config.train_dataloader.dataset = dict(**wrapper, dataset=config.train_dataloader.dataset)
    return config


WRAPPERS = {
    'RepeatDataset': (dict(type='RepeatDataset', times=3), 15),
    'a class': (dict(type=RepeatDataset, times=3), 15),
    'a scope': (dict(type='mmengine.RepeatDataset', times=2), 10),
    'ClassBalancedDataset': (dict(type='ClassBalancedDataset', oversample_thr=1e-3), 5),
}


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_dataset_wrappers_are_kept(toy_dataset, tmp_path, monkeypatch, wrapper):
    monkeypatch.chdir(tmp_path)
    settings, n = WRAPPERS[wrapper]
    config = wrap_train_dataset(load('demo/mask_rcnn'), **settings)
    apply_custom_data(config, DatasetRequest(str(toy_dataset)))
    dataset = DATASETS.build(config.train_dataloader.dataset)
    assert len(dataset) == n and type(dataset).__name__ == short_name(settings['type']).split('.')[-1]
    assert dataset.metainfo['classes'] == ('disc', 'square', 'triangle', 'cross')
    assert dataset[0]['inputs'].shape[0] == 3
    check_classes(config)


def test_wrappers_of_segmentation(toy_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = wrap_train_dataset(load('demo/upernet'), type='RepeatDataset', times=4)
    apply_custom_data(config, DatasetRequest(str(toy_dataset)))
    assert len(DATASETS.build(config.train_dataloader.dataset)) == 20
    with pytest.raises(UsageError, match='train_dataloader: ClassBalancedDataset needs classes per image'):
        apply_custom_data(
            wrap_train_dataset(load('demo/upernet'), type='ClassBalancedDataset', oversample_thr=0.1),
            DatasetRequest(str(toy_dataset)),
        )


def test_multi_image_mix_dataset_keeps_both_pipelines(toy_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in ('MultiImageMixDataset', MultiImageMixDataset):
        config = load('demo/mask_rcnn')
        inner_dataset = dict(
            config.train_dataloader.dataset,
            pipeline=[dict(type='LoadImageFromFile'), dict(type=LoadAnnotations, with_bbox=True)],
        )
        outer_pipeline = [
            dict(type='Mosaic', img_scale=(96, 96), pad_val=114.0),
            dict(type=Resize, scale=(64, 64)),
            dict(type=PackDetInputs),
        ]
        config.train_dataloader.dataset = dict(type=kind, dataset=inner_dataset, pipeline=outer_pipeline)
        apply_custom_data(config, DatasetRequest(str(toy_dataset)))
        dataset = DATASETS.build(config.train_dataloader.dataset)
        sample = dataset[0]
        assert sample['inputs'].shape[1:] == (64, 64)
        assert len(sample['data_samples'].gt_instances) > len(dataset.dataset[0]['gt_bboxes'])  # of four images


def test_concat_dataset(toy_dataset, tmp_path, monkeypatch):
    """With equal pipelines the parts become one custom dataset; different pipelines are refused."""
    monkeypatch.chdir(tmp_path)
    config = load('demo/mask_rcnn')
    dataset = config.train_dataloader.dataset.to_dict()
    datasets = [dataset, {**dataset, 'ann_file': 'other.json', 'data_root': 'elsewhere'}]
    config.train_dataloader.dataset = dict(
        type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=datasets)
    )
    check_classes(config)
    apply_custom_data(config, DatasetRequest(str(toy_dataset)))
    assert len(DATASETS.build(config.train_dataloader.dataset)) == 10
    config = load('demo/mask_rcnn')
    other_dataset = {**dataset, 'pipeline': dataset['pipeline'][:2] + dataset['pipeline'][-1:]}
    config.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[dataset, other_dataset])
    with pytest.raises(UsageError, match='train_dataloader: ConcatDataset concatenates datasets with different'):
        apply_custom_data(config, DatasetRequest(str(toy_dataset)))


UNSUPPORTED = {
    'panoptic': (lambda c: c.train_dataloader.dataset.pipeline[1].update(type='LoadPanopticAnnotations'), 'panoptic'),
    'stuff': (lambda c: c.train_dataloader.dataset.pipeline[1].update(with_seg=True), 'with_seg=True'),
    'proposals': (
        lambda c: c.train_dataloader.dataset.pipeline.insert(1, dict(type='mmdet.LoadProposals')),
        'proposals',
    ),
    'VOC': (
        lambda c: c.update(val_evaluator=dict(type='VOCMetric')),
        'val_evaluator: VOCMetric needs other annotations',
    ),
    'LVIS': (lambda c: c.update(val_evaluator=dict(type='LVISMetric')), 'val_evaluator: LVISMetric needs'),
    'another file': (lambda c: c.update(test_evaluator=dict(type='Mine', ann_file='x')), 'test_evaluator: Mine needs'),
}


@pytest.mark.parametrize('case', UNSUPPORTED)
def test_unsupported_annotations_are_refused(toy_dataset, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    change, words = UNSUPPORTED[case]
    config = load('demo/mask_rcnn')
    change(config)
    with pytest.raises(UsageError, match=words):
        apply_custom_data(config, DatasetRequest(str(toy_dataset)))


# ---- switch pipelines, and mask models ------------------------------------------------------------------------------


def build_config(name, masks=True, train=True, **settings):
    """One of mmdet's configs on a custom dataset with boxes, or with boxes and masks."""
    config = name if isinstance(name, Config) else stock(mmdet, name)
    init_default_scope('mmdet')
    data = CheckedDataset('detection', '/data', ['a', 'b'], {}, Report(), has_masks=masks, **settings)
    apply_dataset(config, data, {'train': 'train.json', 'val': 'val.json'} if train else {'test': 'val.json'}, masks)
    return config


def find_transforms(config, name, *keys):
    return [s for key in keys for s in iter_dicts(config[key]) if is_type(s.get('type'), TRANSFORMS, name)]


@pytest.mark.parametrize('name', ['rtmdet/rtmdet_tiny_8xb32-300e_coco', 'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco'])
def test_switch_pipeline_reads_images_in_the_same_way(name):
    config = build_config(name, apply_exif=False)
    loaders = find_transforms(config, 'LoadImageFromFile', 'train_dataloader', 'val_dataloader', 'custom_hooks')
    assert len(loaders) == 3 and {s['color_type'] for s in loaders} == {'color_ignore_orientation'}
    config = stock(mmdet, name)
    config.model.backbone.in_channels = 1
    assert 'without CachedMixUp, YOLOXHSVRandomAug, which need RGB' in adapt_input_channels(config)
    build_config(config, apply_exif=False)
    loaders = find_transforms(config, 'LoadImageFromFile', 'train_dataloader', 'val_dataloader', 'custom_hooks')
    assert {s['color_type'] for s in loaders} == {'grayscale_ignore_orientation'}
    assert not find_transforms(config, 'YOLOXHSVRandomAug', 'train_dataloader', 'custom_hooks')
    assert len(find_transforms(config, 'CachedMosaic', 'train_dataloader')) == 1


def test_switch_pipeline_loads_no_masks_for_box_data():
    config = stock(mmdet, 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco')
    stage2_pipeline = [
        *config.train_dataloader.dataset.to_dict()['pipeline'],
        dict(type='FilterAnnotations', by_mask=True),
    ]
    config.custom_hooks = [dict(type='PipelineSwitchHook', switch_epoch=1, switch_pipeline=stage2_pipeline)]
    build_config(config, masks=False)
    actual = find_transforms(config, 'LoadAnnotations', 'train_dataloader', 'custom_hooks')
    assert [s['with_mask'] for s in actual] == [False, False]
    assert config.custom_hooks[0].switch_pipeline[-1].by_mask is False and 'mask_head' not in config.model.roi_head
    stage2_pipeline[1].update(type='LoadPanopticAnnotations')
    config.custom_hooks = [dict(type='PipelineSwitchHook', switch_epoch=1, switch_pipeline=stage2_pipeline)]
    with pytest.raises(UsageError, match='custom_hooks: LoadPanopticAnnotations loads panoptic segmentation'):
        build_config(config)


def test_scales_of_the_switch_pipeline_count():
    config = stock(mmdet, 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco')
    stage2_pipeline = [dict(type='Resize', scale=(100, 60), keep_ratio=True)]
    config.custom_hooks = [dict(type='PipelineSwitchHook', switch_epoch=1, switch_pipeline=stage2_pipeline)]
    init_default_scope('mmdet')
    limits = resize_limits(config)
    assert limits['train'].scales == ((100, 60),) and limits['val'].scales == ((1333, 800),)


def test_color_transforms_inside_others_are_removed():
    config = stock(mmdet, 'yolox/yolox_tiny_8xb8-300e_coco')
    init_default_scope('mmdet')
    choice = dict(type='RandomChoice', transforms=[[dict(type='PhotoMetricDistortion')], [dict(type='RandomFlip')]])
    config.train_dataloader.dataset.pipeline.append(choice)
    config.model.backbone.in_channels = 4
    assert adapt_input_channels(config) == (  # it does not normalize
        '4 input channels: images are read unchanged, without Mosaic, PhotoMetricDistortion, YOLOXHSVRandomAug, '
        'which need RGB'
    )
    assert config.train_dataloader.dataset.pipeline[-1]['transforms'] == [[], [dict(type='RandomFlip')]]
    assert {
        s['color_type'] for s in find_transforms(config, 'LoadImageFromFile', 'train_dataloader', 'val_dataloader')
    } == {'unchanged'}


MASK_MODELS = {
    'solo/solo_r50_fpn_1x_coco': 'SOLO',
    'solov2/solov2_r50_fpn_1x_coco': 'SOLOv2',
    'yolact/yolact_r50_1xb8-55e_coco': 'YOLACT',
    'condinst/condinst_r50_fpn_ms-poly-90k_coco_instance': 'CondInst',
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco': 'Mask2Former',
    'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco': 'RTMDetInsSepBNHead',
    'ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco': 'MaskScoringRoIHead',
    'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco': 'PointRendRoIHead',
    'scnet/scnet_r50_fpn_1x_coco': 'SCNetRoIHead',
}


@pytest.mark.parametrize('name', MASK_MODELS)
def test_mask_models_refuse_box_data(name):
    with pytest.raises(UsageError, match=f'^{MASK_MODELS[name]} is trained on masks, but the data set has only boxes:'):
        build_config(name, masks=False)
    if name != 'scnet/scnet_r50_fpn_1x_coco':  # it loads stuff annotations, too
        build_config(name, masks=False, train=False)  # its boxes can still be evaluated
    if name.startswith('solo/'):
        config = stock(mmdet, name)
        config.model.type = SOLO
        with pytest.raises(UsageError, match='^SOLO is trained on masks'):
            build_config(config, masks=False)


@pytest.mark.parametrize(
    'name',
    [
        'boxinst/boxinst_r50_fpn_ms-90k_coco',
        'queryinst/queryinst_r50_fpn_1x_coco',
        'pisa/mask-rcnn_r50_fpn_pisa_1x_coco',
    ],
)
def test_models_without_mask_losses_accept_box_data(name):
    config = build_config(name, masks=False)
    config.model.backbone.init_cfg = None
    if name.startswith('boxinst/'):
        pytest.importorskip('skimage')  # for its color similarity
    with torch.device('meta'):
        MODELS.build(config.model)
    assert config.val_evaluator.metric == ['bbox']


def test_transforms_that_need_masks_refuse_box_data():
    config = stock(mmdet, 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco')
    config.train_dataloader.dataset.pipeline.insert(2, dict(type='mmdet.CopyPaste'))
    build_config(config.copy(), masks=False, train=False)
    with pytest.raises(UsageError, match='train_dataloader: CopyPaste needs masks, but the data set has only boxes'):
        build_config(config, masks=False)


def test_checkpoint_with_other_mask_head_names_keeps_masks(toy_dataset, tmp_path, monkeypatch):
    """A model whose masks come from another head: the data keep their masks."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / 'epoch_1.pth'
    torch.save(dict(meta={}, state_dict={'panoptic_head.cls_embed.weight': torch.zeros(2, 2)}), file)
    config = stock(mmdet, 'mask2former/mask2former_r50_8xb2-lsj-50e_coco')
    config.launcher, config.work_dir = 'none', 'run'
    apply_custom_data(config, DatasetRequest(str(toy_dataset)), checkpoint=str(file))
    assert [s['with_mask'] for s in find_transforms(config, 'LoadAnnotations', 'train_dataloader')] == [True]
    assert list(config.val_evaluator.metric) == ['bbox', 'segm']


# ---- heads of every kind --------------------------------------------------------------------------------------------


def stock(package, name):
    return Config.fromfile(Path(package.__file__).parent / f'.mim/configs/{name}.py', import_custom_modules=False)


def num_outputs(model, pattern):
    """The numbers of output channels of the layers whose names match."""
    return {module.bias.numel() for name, module in model.named_modules() if re.search(pattern, name)}


# mmdet's or mmseg's config, the classification layers, their numbers of outputs for three classes.
HEADS = {
    'mask2former': (mmdet, 'mask2former/mask2former_r50_8xb2-lsj-50e_coco', r'panoptic_head\.cls_embed$', {4}),
    'dino': (mmdet, 'dino/dino-4scale_r50_8xb2-12e_coco', r'cls_branches\.\d$', {3}),
    'detr': (mmdet, 'detr/detr_r50_8xb2-150e_coco', r'bbox_head\.fc_cls$', {4}),
    'solo': (mmdet, 'solo/solo_r50_fpn_1x_coco', r'mask_head\.conv_cls$', {3}),
    'solov2': (mmdet, 'solov2/solov2_r50_fpn_1x_coco', r'mask_head\.conv_cls$', {3}),
    'rtmdet': (mmdet, 'rtmdet/rtmdet_tiny_8xb32-300e_coco', r'bbox_head\.rtm_cls\.\d$', {3}),
    'rtmdet-ins': (mmdet, 'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco', r'bbox_head\.rtm_cls\.\d$', {3}),
    'yolox': (mmdet, 'yolox/yolox_tiny_8xb8-300e_coco', r'multi_level_conv_cls\.\d$', {3}),
    'retinanet': (mmdet, 'retinanet/retinanet_r50_fpn_1x_coco', r'bbox_head\.retina_cls$', {27}),
    'point_rend': (mmdet, 'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco', r'(mask|point)_head\.fc_logits', {3, 147}),
    'mask2former of mmseg': (
        mmseg,
        'mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024',
        r'decode_head\.cls_embed$',
        {4},
    ),
    'segmenter': (mmseg, 'segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512', r'decode_head\.mask_norm$', {3}),
    'ocrnet': (mmseg, 'ocrnet/ocrnet_hr18s_4xb2-40k_cityscapes-512x1024', r'decode_head\.\d\.conv_seg$', {3}),
}


@pytest.mark.parametrize('case', HEADS)
def test_num_classes_of_mmdet_and_mmseg_heads(case):
    package, name, layers, expected = HEADS[case]
    config = stock(package, name)
    set_num_classes(config.model, 3)
    init_default_scope(package.__name__)
    for part in ('backbone', 'pretrained'):
        if part == 'pretrained' or 'init_cfg' in (config.model.get(part) or {}):
            config.model.pop(part, None) if part == 'pretrained' else config.model[part].update(init_cfg=None)
    assert num_outputs(build_on_meta(config.model), layers) == expected


def test_class_weights_and_queries_are_adapted():
    model = stock(mmdet, 'mask2former/mask2former_r50_8xb2-lsj-50e_coco').model
    set_num_classes(model, 3)
    assert model.panoptic_head.loss_cls.class_weight == [1.0] * 3 + [0.1]
    assert (model.panoptic_head.num_things_classes, model.panoptic_head.num_stuff_classes) == (3, 0)
    assert (model.panoptic_fusion_head.num_things_classes, model.panoptic_fusion_head.num_stuff_classes) == (3, 0)
    assert model.panoptic_head.out_channels == 256 and model.test_cfg.max_per_image == 100
    model.panoptic_head.num_queries = 20
    set_num_classes(model, 3)
    assert model.test_cfg.max_per_image == 60  # topk of 20 queries and 3 classes
    head = dict(num_queries=100, num_classes=256, out_channels=256)
    set_num_classes(dict(decode_head=head), 3)
    assert head == dict(num_queries=100, num_classes=3, out_channels=256)
    with pytest.raises(UsageError, match='class_weight of PIDHead has 19 values, but the data set 3 classes'):
        set_num_classes(stock(mmseg, 'pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes').model, 3)


# ---- config files that are data -------------------------------------------------------------------------------------

MALICIOUS_YAML = {
    'a tag': '!!python/object/apply:os.system ["touch ran"]',
    'a tag within': 'model:\n  type: !!python/object/new:subprocess.Popen [["touch", "ran"]]',
    'a name': 'model: !!python/name:os.system',
    'a path as a type': 'default_scope: mmdet\nmodel: {type: subprocess.Popen, args: touch ran, shell: true}',
    "a function of mmengine's": 'default_scope: mmdet\nmodel: {type: mmengine.utils.call_command, cmd: [touch, ran]}',
    'a constructor': 'default_scope: mmdet\nmodel: {type: MaskRCNN}\noptim_wrapper: {constructor: os.system}',
}


@pytest.mark.parametrize('case', MALICIOUS_YAML)
@pytest.mark.parametrize('suffix', ['yaml', 'yml'])
def test_yaml_configs_execute_no_code(run_tool, tmp_path, case, suffix):
    (tmp_path / f'c.{suffix}').write_text(MALICIOUS_YAML[case])
    one_line_error(run_tool('complexity.py', f'c.{suffix}'), f'c.{suffix}')
    (tmp_path / 'below.py').write_text(f"_base_ = 'c.{suffix}'")
    if '!!' in MALICIOUS_YAML[case]:
        one_line_error(run_tool('complexity.py', 'below.py'), 'below.py')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize(
    ('type_', 'settings'),
    [('subprocess.Popen', '"args": "ls"'), ('mmengine.dump', '"obj": {}, "file": "ran.json"')],
)
def test_json_configs_execute_no_code(run_tool, tmp_path, type_, settings):
    """Nor functions of a package whose types are registered."""
    (tmp_path / 'c.json').write_text(f'{{"default_scope": "mmdet", "model": {{"type": "{type_}", {settings}}}}}')
    one_line_error(run_tool('complexity.py', 'c.json'), f"type='{type_}' is not a registered type")
    assert not (tmp_path / 'ran.json').exists()


@pytest.mark.parametrize(
    'model',
    [
        '{"type": "CameraMotionCompensation", "warp_mode": "open(chr(114), chr(119))"}',
        '{"type": "CrossEntropyLoss", "class_weight": "http://127.0.0.1/weights.pkl"}',
        '{"type": "CrossEntropyLoss", "class_weight": "mmseg.pkl"}',
        '{"type": "CrossEntropyLoss", "class_weight": "pickle"}',
        '{"test_cfg": {"rcnn": {"nms": {"type": "exec(chr(49))"}}}}',
    ],
)
def test_json_models_with_code_or_urls_are_refused(run_tool, tmp_path, model):
    """mmdet evaluates the first, mmcv the last, and mmseg loads the pickle."""
    (tmp_path / 'c.json').write_text(f'{{"default_scope": "mmdet", "model": {model}}}')
    one_line_error(run_tool('complexity.py', 'c.json'), 'could be code, a path or an address')


def test_yaml_alias_bomb_is_refused(run_tool, tmp_path):
    lines = ['a0: &a0 [x]', *(f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 10)}]' for i in range(1, 12)), 'model: *a11']
    (tmp_path / 'c.yaml').write_text('\n'.join(lines))
    one_line_error(run_tool('complexity.py', 'c.yaml'), 'more than 1,000,000 values')


@pytest.mark.parametrize('suffix', ['yaml', 'json'])
def test_dumped_yaml_and_json_are_read(run_tool, tmp_path, suffix):
    """Dumped YAML contains tuples, with a Python tag that is safe."""
    config = load('mask_rcnn/convnext_t')
    config.dump(str(tmp_path / f'c.{suffix}'))
    process = run_tool('complexity.py', f'c.{suffix}')
    assert process.returncode == 0 and '48,095,376' in process.stdout, process.stderr
