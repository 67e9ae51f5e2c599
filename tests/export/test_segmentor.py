"""An exported segmentor gives what mmseg gives, at every size, in every runtime."""

import numpy as np
import onnx
import openvino
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmseg.models import UPerHead
from mmseg.models.decode_heads import Mask2FormerHead
from mmseg.structures import SegDataSample
from onnxruntime import InferenceSession

from convnext_dense.errors import UsageError
from convnext_dense.export.check import FULL, compare_file
from convnext_dense.export.files import write_onnx
from convnext_dense.export.program import ExportOptions, trace
from convnext_dense.export.segmentor import ExportableSegmentor
from convnext_dense.inference.model import load_model
from convnext_dense.models.optimize import optimize
from helpers.checkpoints import balance_classes, draw_photo, save_checkpoint
from helpers.paths import ROOT
from helpers.weights import random_weights

CHANNELS = [16, 24]
WHOLE, SLIDE = dict(mode='whole'), dict(mode='slide', crop_size=(64, 80), stride=(43, 50))
# (N, H, W) of the images, (h, w) of the result.
TRACED = (1, 96, 150), (70, 131)
OTHERS = (
    ((2, 96, 150), (96, 150)),
    ((1, 97, 151), (40, 211)),
    ((1, 131, 60), (131, 60)),  # portrait, at one side smaller than the crop
    ((1, 45, 37), (90, 74)),  # smaller than the crop
    ((3, 64, 80), (64, 80)),  # one window
    ((1, 210, 190), (33, 29)),
)


class OwnPredict(UPerHead):
    def predict_by_feat(self, seg_logits, batch_img_metas):
        return super().predict_by_feat(seg_logits, batch_img_metas) * 2 - 1


def head(kind='UPerHead', **settings):
    levels = kind in ('UPerHead', OwnPredict)
    inputs = dict(in_channels=CHANNELS, in_index=[0, 1]) if levels else dict(in_channels=CHANNELS[-1], in_index=1)
    loss = dict(type='CrossEntropyLoss')
    return dict(type=kind, channels=16, num_classes=5, align_corners=False, loss_decode=loss, **inputs) | settings


def build(decode_head=None, test_cfg=SLIDE, data_preprocessor=None, **backbone):
    """A segmentor with made weights that sees all its classes."""
    model = Config.fromfile(ROOT / 'configs/demo/upernet.py').model
    init_default_scope('mmseg')
    model.data_preprocessor.update(data_preprocessor or {})
    model.backbone = dict(type='ConvNeXt', arch=dict(depths=(1, 1), channels=CHANNELS), out_indices=(0, 1))
    model.backbone.update(backbone)
    model.decode_head = dict(norm_cfg=dict(type='BN'), **(decode_head or head()))
    model.auxiliary_head = None
    model.test_cfg = test_cfg
    model = MODELS.build(model)
    weights = random_weights({name: tuple(value.shape) for name, value in model.state_dict().items()})
    model.load_state_dict({k: v.abs() + 0.5 if k.endswith('running_var') else v for k, v in weights.items()})
    return balance_classes(model)


def random_images(shape, channels=3):
    n, height, width = shape
    rng = np.random.RandomState(height * width)
    images = np.stack([draw_photo(rng, height, width) for _ in range(n)])
    return torch.from_numpy(images).permute(0, 3, 1, 2)[:, :channels].contiguous()


@torch.no_grad()
def mmseg_result(model, images, output_size):
    """Logits (N, C, h, w) and labels (N, h, w) as mmseg's own test has them."""
    meta = dict(ori_shape=tuple(output_size), img_shape=tuple(images.shape[2:]))
    inputs = images.flip(1) if images.shape[1] == 3 else images
    samples = model.test_step(dict(inputs=list(inputs), data_samples=[SegDataSample(metainfo=meta) for _ in images]))
    logits = torch.stack([sample.seg_logits.data for sample in samples]).numpy()
    return logits, torch.cat([sample.pred_sem_seg.data for sample in samples]).numpy()


def assert_equal_result(actual, expected, returns_logits):
    logits, labels = expected
    if returns_logits:
        assert actual.dtype == np.float32 and actual.shape == logits.shape
        assert np.abs(actual - logits).max() < 1e-4 * max(1, np.abs(logits).max())
    else:
        assert actual.dtype == np.uint8 and actual.shape == labels.shape
        assert (actual == labels).mean() >= 0.9999


MODELS_IN_EAGER = {
    'UPerHead slide': {},
    'UPerHead whole': dict(test_cfg=WHOLE),
    'windows side by side': dict(test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(64, 64))),
    'many windows': dict(test_cfg=dict(mode='slide', crop_size=(64, 48), stride=(20, 13))),
    'V2': dict(use_grn=True),
    'PSPHead': dict(decode_head=head('PSPHead', pool_scales=(1, 2, 3, 6))),
    'FCNHead': dict(decode_head=head('FCNHead', num_convs=1), test_cfg=WHOLE),
    'DepthwiseSeparableASPPHead': dict(
        decode_head=head('DepthwiseSeparableASPPHead', c1_in_channels=16, c1_channels=8, dilations=(1, 2))
    ),
    'SegformerHead': dict(decode_head=head('SegformerHead', in_channels=CHANNELS, in_index=[0, 1])),
    'FPNHead': dict(decode_head=head('FPNHead', in_channels=CHANNELS, in_index=[0, 1], feature_strides=[4, 8])),
    'APCHead': dict(decode_head=head('APCHead', pool_scales=(1, 3), fusion=True)),
    'align_corners': dict(decode_head=head(align_corners=True)),
    'optimized': {},
    'a head with a test of its own': dict(decode_head=head(OwnPredict)),
    'one output channel': dict(decode_head=head(num_classes=2, out_channels=1, threshold=0.5)),
    'gray': dict(in_channels=1, data_preprocessor=dict(mean=[114], std=[57])),
    'padded': dict(data_preprocessor=dict(test_cfg=dict(size_divisor=32)), test_cfg=WHOLE),
    'padded to a size': dict(data_preprocessor=dict(test_cfg=dict(size=(100, 160)))),
}


@pytest.mark.parametrize('name', MODELS_IN_EAGER)
@torch.no_grad()
def test_equals_mmseg(name):
    settings = MODELS_IN_EAGER[name]
    model, classes = build(**settings), set()
    if name == 'optimized':
        optimize(model)
    for shape, size in (TRACED, *OTHERS):
        images = random_images(shape, settings.get('in_channels', 3))
        expected = mmseg_result(model, images, size)
        classes |= {*np.unique(expected[1])}
        for logits in (True, False):
            exportable = ExportableSegmentor(model, logits=logits)
            assert_equal_result(exportable(images, torch.tensor(size)).numpy(), expected, logits)
    assert len(classes) > 1


@torch.no_grad()
def test_raw_inputs_and_image_size():
    model = build()
    images = random_images((1, 97, 151))
    logits, labels = mmseg_result(model, images, (97, 151))
    assert (ExportableSegmentor(model)(images).numpy() == labels).mean() > 0.9999
    inputs = model.data_preprocessor(dict(inputs=list(images.flip(1))))['inputs']
    raw = ExportableSegmentor(model, raw=True, logits=True)(inputs)
    assert_equal_result(raw.numpy(), (logits, None), True)


@torch.no_grad()
def test_more_than_256_classes():
    images = random_images((1, 64, 64))
    for n, dtype in ((255, torch.uint8), (256, torch.int32)):
        model = build(head('FCNHead', num_classes=n, num_convs=1), WHOLE)
        labels = ExportableSegmentor(model)(images)
        assert labels.dtype == dtype
        assert (labels.numpy() == mmseg_result(model, images, (64, 64))[1]).mean() > 0.9999


def test_unknown_test_mode_is_refused():
    model = build()
    model.test_cfg.mode = 'panorama'
    with pytest.raises(UsageError, match="test_cfg.mode 'panorama' cannot be exported: give one of whole, slide"):
        ExportableSegmentor(model)


DYNAMIC = torch.export.Dim.DYNAMIC


@pytest.mark.parametrize('name', ['optimized FPNHead', 'of one size'])
@torch.no_grad()
def test_program_equals_mmseg_at_every_size(name):
    sizes, dims = (TRACED, *OTHERS), {0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC}
    if name == 'of one size':
        model, dims = build(head('FCNHead', num_convs=1)), {0: DYNAMIC}
        sizes = [((n, *TRACED[0][1:]), size) for (n, *_), size in sizes]
    else:
        inputs = dict(in_channels=CHANNELS, in_index=[0, 1], feature_strides=[4, 8])
        model = optimize(build(head('FPNHead', align_corners=True, **inputs), WHOLE))
    args = random_images((2, *TRACED[0][1:])), torch.tensor(TRACED[1])
    exportable = ExportableSegmentor(model)
    assert exportable.output_names == ['segmentation']
    program = torch.export.export(exportable, args, dynamic_shapes=(dims, None), strict=False)
    assert not any('convnext_dense' in str(node.target) for node in program.graph.nodes)  # this package's operators
    program = program.module()
    for shape, size in sizes:
        images = random_images(shape)
        assert_equal_result(program(images, torch.tensor(size)).numpy(), mmseg_result(model, images, size), False)


def export(model, path, **settings):
    """Write an ONNX file of a model, traced with one image of one window, which a tracer might take for granted."""
    args = random_images((1, 45, 37)), torch.tensor(TRACED[1])
    shapes = {0: 'batch', 2: 'height', 3: 'width'}, None
    options = dict(dynamo=True, opset_version=18, verbose=False, dynamic_shapes=shapes)
    torch.onnx.export(ExportableSegmentor(model, **settings), args, path, **options)


FILES = {
    'slide labels': (dict(), False),
    'V2 PSPHead align_corners whole logits': (
        dict(decode_head=head('PSPHead', align_corners=True), test_cfg=WHOLE, use_grn=True),
        True,
    ),
}


@pytest.fixture(scope='module', params=FILES)
def exported(request, tmp_path_factory):
    settings, logits = FILES[request.param]
    model, path = build(**settings), tmp_path_factory.mktemp('export') / 'model.onnx'
    export(model, path, logits=logits)
    return model, path, logits


def run_onnxruntime(path):
    session = InferenceSession(path, providers=['CPUExecutionProvider'])
    names = [item.name for item in session.get_inputs()]
    return lambda *inputs: session.run(None, dict(zip(names, inputs)))[0]


def run_openvino(path):
    model = openvino.Core().compile_model(path, 'CPU', dict(INFERENCE_PRECISION_HINT='f32'))
    return lambda *inputs: model(inputs)[0]


@pytest.mark.parametrize('runtime', [run_onnxruntime, run_openvino])
def test_exported_file_equals_mmseg_at_every_size(runtime, exported):
    model, path, logits = exported
    run = runtime(path)
    for shape, size in (TRACED, *OTHERS):
        images = random_images(shape)
        assert_equal_result(run(images.numpy(), np.array(size)), mmseg_result(model, images, size), logits)


def test_exported_file_has_only_standard_operators(exported):
    file = onnx.load(exported[1])
    assert {node.domain for node in file.graph.node} == {''} and not file.functions
    assert {node.op_type for node in file.graph.node}.isdisjoint({'Loop', 'If', 'ScatterND'})


@pytest.fixture
def mask2former():
    config = Config.fromfile(ROOT / 'configs/demo/mask2former.py')
    init_default_scope('mmseg')
    model = MODELS.build(config.model).eval()
    model.load_state_dict(random_weights({name: tuple(value.shape) for name, value in model.state_dict().items()}))
    return model


@torch.no_grad()
def test_mask2former_equals_mmseg(mask2former):
    exportable = ExportableSegmentor(mask2former, logits=True)
    for shape, size in (((2, 96, 150), (70, 131)), OTHERS[2]):
        images = random_images(shape)
        expected = mmseg_result(mask2former, images, size)
        assert np.abs(expected[0]).max() > 0.1
        assert_equal_result(exportable(images, torch.tensor(size)).numpy(), expected, True)
    assert 'forward' not in vars(mask2former.decode_head.pixel_decoder)  # the model is as it was


def test_mask2former_with_other_predictions_is_refused(mask2former):
    class OtherHead(Mask2FormerHead):
        def predict(self, x, batch_img_metas, test_cfg):
            return super().predict(x, batch_img_metas, test_cfg) * 2

    mask2former.decode_head.__class__ = OtherHead
    with pytest.raises(UsageError, match='OtherHead cannot be exported: its predict is not that of Mask2FormerHead'):
        ExportableSegmentor(mask2former)


@pytest.mark.slow
def test_exported_mask2former_equals_the_model(tmp_path):
    predictor = load_model(save_checkpoint('mask2former', tmp_path / 'model.pth'), device='cpu')
    write_onnx(trace(predictor, ExportOptions()), tmp_path / 'model.onnx')
    for difference in compare_file(tmp_path / 'model.onnx', predictor, ExportOptions(), FULL):
        assert difference.pixels >= 0.9999
