"""`--mosaic` and `--copy-paste`: what they refuse, what they do to images, and runs that are killed and resumed."""

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.hooks import Hook
from mmengine.registry import TRANSFORMS
from mmengine.structures import BaseDataElement

from convnext_dense.config.mixed_images import set_copy_paste, set_mosaic
from convnext_dense.config.tree import iter_dicts
from convnext_dense.engine.build import register_checkpoint_loader
from convnext_dense.errors import UsageError
from helpers.planned_runs import planned_run
from helpers.recipes import load


@TRANSFORMS.register_module()
class ToPlanned(BaseTransform):
    """Makes a sample that a planned run trains on; its factor in the loss is that of the pixels and the boxes."""

    def transform(self, results):
        sample = BaseDataElement(metainfo=dict(img_path=results['img_path'], shape=results['img'].shape[:2]))
        values = torch.tensor([results['img'].astype(np.float64).mean(), results['gt_bboxes'].tensor.double().sum()])
        sample.factor = values.mean().float() / 1000
        return dict(inputs=values.float(), data_samples=sample)


class Recorder(Hook):
    """Shapes of the images by epoch; ends the run before an iteration."""

    def __init__(self, kill=None):
        self.kill, self.shapes = kill, {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.kill:
            raise RuntimeError('killed')
        self.shapes.setdefault(runner.epoch, []).extend(sample.shape for sample in data_batch['data_samples'])


def boxes_only(config):
    for step in iter_dicts(config.train_dataloader.dataset.pipeline):
        if 'with_mask' in step:
            step['with_mask'] = False
    return config


def mixed(name, data, monkeypatch):
    monkeypatch.setenv('SHAPES_ROOT', data)
    config = load('demo/mask_rcnn')
    if name == 'mosaic':
        line = set_mosaic(boxes_only(config))
        assert line == 'mosaics of four images, but not in the last epoch'
        config.custom_hooks[0].num_last_epochs = 2
    else:
        set_copy_paste(config)
    dataset = config.train_dataloader.dataset
    dataset.pipeline = [
        step for step in dataset.pipeline if step.type in ('Mosaic', 'RandomAffine', 'AnySizeCopyPaste')
    ]
    dataset.pipeline.append(dict(type='ToPlanned'))
    return config


def run(folder, config, kill=None, load_from=None, workers=0):
    recorder = Recorder(kill)
    runner = planned_run(
        *([], folder, [recorder, *(config.get('custom_hooks') or [])]),
        train_cfg=dict(by_epoch=True, max_epochs=4),
        loader=dict(dataset=config.train_dataloader.dataset, num_workers=workers, persistent_workers=workers > 0),
        checkpoint=dict(interval=3, by_epoch=False),
        load_from=load_from,
        default_scope='mmdet',
    )
    runner.train()
    return runner.model.weight.detach().clone(), recorder.shapes


@pytest.mark.parametrize('name, kills', [('mosaic', (7, 15)), ('copy-paste', (7,))])
def test_killed_runs_end_as_uninterrupted_ones(name, kills, data, tmp_path, monkeypatch):
    """Runs of sixteen iterations, killed within an epoch; with another number of workers."""
    register_checkpoint_loader()
    config = mixed(name, data, monkeypatch)
    uninterrupted, shapes = run(tmp_path / 'whole', config, workers=2)
    if name == 'mosaic':  # 128 is the test size, 64 that of the images
        assert [{*shapes[epoch]} for epoch in range(4)] == [{(128, 128)}] * 2 + [{(64, 64)}] * 2
    for kill in kills:
        folder = tmp_path / str(kill)
        with pytest.raises(RuntimeError, match='killed'):
            run(folder, config, kill)
        resumed, _ = run(folder, config, None, (folder / 'last_checkpoint').read_text())
        assert torch.equal(resumed, uninterrupted) and not torch.equal(uninterrupted, torch.ones(2))


def instance(size, box, value, label):
    height, width = size
    mask = np.zeros((1, height, width), np.uint8)
    left, top, right, bottom = box
    mask[0, top:bottom, left:right] = 1
    return dict(
        img=np.full((height, width, 3), value, np.uint8),
        img_shape=size,
        gt_bboxes=HorizontalBoxes([box], dtype=torch.float32),
        gt_bboxes_labels=np.int64([label]),
        gt_ignore_flags=np.bool_([False]),
        gt_masks=BitmapMasks(mask, height, width),
    )


@pytest.mark.parametrize('size', [(40, 60), (80, 30), (50, 50)])
def test_copy_paste_from_an_image_of_another_size(size):
    """Pixels, masks and boxes agree, and what is hidden is no longer in the mask below."""
    from convnext_dense.datasets.copy_paste import AnySizeCopyPaste

    np.random.seed(0)
    target, source = instance((50, 50), (10, 10, 40, 40), 1, 0), instance(size, (5, 20, 25, 38), 2, 1)
    results = AnySizeCopyPaste(selected=False).transform({**target, 'mix_results': [source]})
    assert results['img'].shape == (50, 50, 3) and results['img'].dtype == np.uint8
    assert results['gt_bboxes_labels'].tolist() == [0, 1]
    below, pasted = results['gt_masks'].masks
    assert np.array_equal(results['img'][..., 0] == 2, pasted == 1) and pasted.any() and not (below & pasted).any()
    ys, xs = np.nonzero(pasted)
    box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert results['gt_bboxes'].tensor[1].tolist() == pytest.approx(box)


REFUSED = {
    '--mosaic is for detection, not': (set_mosaic, 'demo/upernet', None),
    '--copy-paste is for detection, not': (set_copy_paste, 'demo/upernet', None),
    '--mosaic is for boxes': (set_mosaic, 'demo/mask_rcnn', None),
    '--copy-paste needs the masks of objects': (set_copy_paste, 'demo/mask_rcnn', boxes_only),
    '--mosaic: the config has CachedMosaic already': (set_mosaic, 'rtmdet/convnext_b', None),
    '--copy-paste: the config has AnySizeCopyPaste already': (
        set_copy_paste,
        'demo/mask_rcnn',
        set_copy_paste,
    ),
    '--copy-paste needs images of three channels: leave it out': (
        set_copy_paste,
        'demo/mask_rcnn',
        lambda config: config.model.backbone.update(in_channels=2),
    ),
    '--mosaic needs at least two epochs, as the last are without mosaics: the config has one epoch': (
        set_mosaic,
        'demo/mask_rcnn',
        lambda config: boxes_only(config).train_cfg.update(max_epochs=1),
    ),
    '--mosaic needs at least two epochs, as the last are without mosaics: the config has iterations': (
        set_mosaic,
        'dino/convnext_t',
        None,
    ),
    '--mosaic needs at least two epochs, as the last are without mosaics: the config has iterations instead': (
        set_mosaic,
        'demo/dino',  # whose pipeline loads masks, which the model does not use
        None,
    ),
}


def test_masks_that_a_model_does_not_use_are_not_loaded_for_mosaics():
    config = load('demo/dino')
    config.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=10)
    assert set_mosaic(config) == 'mosaics of four images, but not in the last epoch'
    steps = [step for step in iter_dicts(config.train_dataloader) if step.get('type') == 'LoadAnnotations']
    assert steps and not any(step['with_mask'] for step in steps)


@pytest.mark.parametrize('message', REFUSED)
def test_unsupported_configs_are_refused(message):
    function, name, change = REFUSED[message]
    config = load(name)
    if change:
        change(config)
    original = config.to_dict()
    with pytest.raises(UsageError) as error:
        function(config)
    assert str(error.value).startswith(message) and '\n' not in str(error.value) and config.to_dict() == original


@pytest.mark.parametrize('name, thresholds', [('mask_rcnn/convnext_t', (10, 300)), ('demo/mask_rcnn', (1, 5))])
def test_thresholds_of_hidden_objects_scale_with_the_image_size(name, thresholds):
    """mmdet's thresholds are for 1333 x 800; of 128 x 128 it is an eighth of the side."""
    config = load(name)
    set_copy_paste(config)
    step = config.train_dataloader.dataset.pipeline[0]
    assert (step.bbox_occluded_thr, step.mask_occluded_thr) == thresholds


def test_images_without_objects_are_kept_for_mixing():
    """mmdet's wrapper would end the training at one."""
    config = load('mask_rcnn/convnext_b_lsj')
    set_copy_paste(config)
    inner, outer = config.train_dataloader.dataset.dataset.pipeline, config.train_dataloader.dataset.pipeline
    assert [step.type for step in outer] == ['AnySizeCopyPaste', 'PackDetInputs']
    assert [step.type for step in inner][-2:] == ['FilterAnnotations', 'RandomFlip']  # whose wrapper takes another one
    config = boxes_only(load('mask_rcnn/convnext_b_lsj'))
    set_mosaic(config)
    steps = {step.type: step for step in config.train_dataloader.dataset.pipeline}
    assert steps['FilterAnnotations'].keep_empty is False and steps['RandomCrop'].allow_negative_crop
