"""Swin Transformers as functions of images compute what mmdet's and mmseg's compute, and so do their files."""

import pytest
import torch
from mmdet.models import SwinTransformer as DetSwin
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmseg.models import SwinTransformer as SegSwin
from torch import nn

from convnext_dense.errors import UsageError
from convnext_dense.export.check import check_file
from convnext_dense.export.files import WRITERS
from convnext_dense.export.program import ExportOptions, trace
from convnext_dense.export.swin import traceable_backbone
from convnext_dense.inference.checkpoint_config import ModelSource
from convnext_dense.inference.model import Predictor
from helpers.checkpoints import CLASSES
from helpers.paths import ROOT
from helpers.weights import load_random_weights

SMALL = dict(embed_dims=8, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4), window_size=4)


def make_model(cls, **settings):
    model = nn.Module()
    model.backbone = cls(**SMALL | settings)
    load_random_weights(model)
    model.backbone.eval()  # returns None
    return model


@pytest.mark.parametrize('cls', [DetSwin, SegSwin])
def test_backbone_equals_the_original(cls):
    """At sizes at which patches, windows or both are padded, or none; the model itself does not change."""
    model = make_model(cls)
    traceable = traceable_backbone(model).backbone
    assert 'forward' not in vars(model.backbone.patch_embed.adap_padding)
    assert all(a is b for a, b in zip(model.backbone.parameters(), traceable.parameters(), strict=True))
    for size in [(128, 128), (97, 131), (64, 250)]:
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for expected, actual in zip(model.backbone(images), traceable(images), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_patches_that_overlap_are_refused():
    with pytest.raises(
        UsageError, match='SwinTransformer can be exported only with patches that are padded and do not'
    ):
        traceable_backbone(make_model(DetSwin, strides=(4, 1, 2, 2)))


@pytest.mark.parametrize('suffix', ['.pt2', pytest.param('.onnx', marks=pytest.mark.slow)])
def test_exported_file_equals_the_model(suffix, tmp_path):
    config = Config.fromfile(ROOT / 'configs/demo/upernet_swin.py')
    init_default_scope('mmseg')
    config.model.backbone.update(SMALL, depths=(1, 1, 2, 1), init_cfg=None)
    config.model.decode_head.update(in_channels=[8, 16, 32, 64], channels=16)
    config.model.auxiliary_head.in_channels = 32
    model = revert_sync_batchnorm(MODELS.build(config.model))
    load_random_weights(model)
    source = ModelSource('made.pth', config, 'segmentation', CLASSES['upernet'], ())
    predictor = Predictor(model.eval(), source, 'cpu')
    path, options = tmp_path / f'model{suffix}', ExportOptions(logits=True)
    WRITERS[suffix](trace(predictor, options), path)
    assert len(check_file(path, predictor, options)) > 4
