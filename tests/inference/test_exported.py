"""Exported models instead of checkpoints: hand-made files with known results."""

import sys

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config

from convnext_dense import load_model
from convnext_dense.checkpoints.exported_files import read_exported
from convnext_dense.errors import TrainingError, UsageError
from convnext_dense.inference.exported import ExportedModel
from convnext_dense.inference.sessions import SESSIONS, session_device
from helpers.checkpoints import CLASSES
from helpers.exported import (
    BOXES,
    demo_config,
    make_meta,
    save_detector,
    save_openvino,
    save_program,
    save_segmentor,
)

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
SIZES = [(60, 90), (131, 77), (64, 64)]  # height and width of photos; the test pipeline resizes to 128


def make_photo(height, width, red=51):
    """An RGB image, blue on the left and green on the right, with a constant red channel."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = red
    image[:, : width // 2, 2] = 200
    image[:, width // 2 :, 1] = 200
    return image


def assert_detections(sample, size, red=51, atol=1e-3, has_masks=True):
    height, width = size
    instances = sample.pred_instances
    expected = BOXES[:2] * np.float32([width, height, width, height])
    assert np.allclose(instances.bboxes, expected, atol=atol)
    assert np.allclose(instances.scores, np.float32([red / 255, red / 510]), atol=2e-3)
    assert instances.labels.tolist() == [2, 0] and instances.labels.dtype == torch.int64
    assert ('masks' in instances) == has_masks
    if has_masks:
        assert instances.masks.shape == (2, height, width) and instances.masks.dtype == torch.bool


def assert_rows(masks, height, slack=0):
    """Masks are the first half and the first quarter of the rows."""
    for mask, fraction in zip(masks, (0.5, 0.25)):
        rows = mask.all(1).sum().item()
        assert abs(rows - np.ceil(height * fraction)) <= slack and mask.any(1).sum().item() == rows


def assert_halves(labels, size):
    assert tuple(labels.shape) == (1, *size)
    middle = size[1] // 2
    assert (labels[0, :, : middle - 2] == 2).all() and (labels[0, :, middle + 2 :] == 1).all()


@pytest.mark.parametrize('suffix', ['.onnx', '.xml'])
def test_detections_are_in_the_coordinates_of_each_image(suffix, detector, folder):
    path = detector
    if suffix == '.xml':
        pytest.importorskip('openvino')
        path = save_openvino(folder / 'detector.xml', detector)
    model = load_model(path)
    assert model.task == 'detection' and model.classes == CLASSES['mask_rcnn'] and model.device.type == 'cpu'
    images = [make_photo(*size) for size in (*SIZES, SIZES[0])]
    samples = model.predict(images, channel_order='rgb', batch_size=3)
    for sample, size in zip(samples, [*SIZES, SIZES[0]]):
        assert_detections(sample, size)
        assert_rows(sample.pred_instances.masks, size[0])
    (sample_of_class,) = model.predict(images[:1], channel_order='rgb', classes=['triangle'], score_thr=0.05)
    assert sample_of_class.pred_instances.labels.tolist() == [2]
    drawing = model.draw(images[0][..., ::-1].copy(), sample_of_class, channel_order='bgr')
    assert drawing.size[0] >= 90


def test_padding_by_the_test_pipeline_is_not_the_image(folder):
    """As RTMDet's pads; boxes beyond the image are cut off, and masks too."""
    config = Config.fromstring(demo_config('mask_rcnn'), '.py')
    config.test_dataloader.dataset.pipeline.insert(2, dict(type='Pad', size=(128, 128)))
    model = load_model(save_detector(folder / 'padded.onnx', make_meta('mask_rcnn', config=config.pretty_text)))
    for height, width in SIZES:
        sample = model.predict(make_photo(height, width), channel_order='rgb').pred_instances
        expected = BOXES[:2] * max(height, width)
        assert np.allclose(sample.bboxes, expected.clip(max=np.float32([width, height] * 2)), atol=0.5)
        assert sample.masks.shape == (2, height, width)


@pytest.mark.parametrize('head, width', [('RetinaHead', 121), ('mmdet.RTMDetInsSepBNHead', 122)])
def test_padded_masks_of_rtmdet_ins_are_rounded_up(head, width, detector):
    """As mmdet's: at 224 x 124 of 224 x 224, an image of 67 pixels would be 121.03 with its padding."""
    model = ExportedModel(read_exported(detector), dict(bbox_head=dict(type=head)))
    sample = DetDataSample(metainfo=dict(ori_shape=(121, 67), scale_factor=(124 / 67, 224 / 121)))
    assert model._prepare([torch.zeros(3, 224, 224)], [sample])[1].space == (121, width)


@pytest.mark.parametrize('suffix', ['.onnx', '.xml', '.pt2'])
def test_segmentation_has_the_size_of_each_image(suffix, segmentor, folder):
    path = segmentor
    if suffix == '.xml':
        pytest.importorskip('openvino')
        path = save_openvino(folder / 'segmentor.xml', segmentor)
    elif suffix == '.pt2':
        path = save_program(folder / 'segmentor.pt2')
    model = load_model(path)
    for sample, size in zip(model.predict([make_photo(*s) for s in SIZES], channel_order='rgb', batch_size=2), SIZES):
        assert_halves(sample.pred_sem_seg.data, size)
        assert 'seg_logits' not in sample


def test_logits_are_returned_and_blended_over_tiles(folder):
    model = load_model(save_segmentor(folder / 'logits.onnx', with_logits=True))
    image = make_photo(90, 300)
    sample = model.predict_arrays([image[..., ::-1]], with_logits=True)[0]
    assert sample.seg_logits.data.shape == (5, 90, 300)
    assert_halves(sample.pred_sem_seg.data, (90, 300))
    assert_halves(model.predict(image, channel_order='rgb', tile=64).pred_sem_seg.data, (90, 300))


def test_detections_of_tiles_and_scales_are_merged(detector):
    model = load_model(detector)
    image = make_photo(90, 300)
    sample = model.predict(image, channel_order='rgb', tile=100, overlap=0.25)
    assert len(sample.pred_instances.scores) >= 4 and sample.pred_instances.masks[0]['size'] == [90, 300]
    sample = model.predict(image, channel_order='rgb', multiscale=True)
    assert sample.pred_instances.masks.shape[1:] == (90, 300)


def test_box_masks_are_pasted_into_the_image(folder):
    model = load_model(save_detector(folder / 'box.onnx', make_meta('mask_rcnn', masks='box')))
    sample = model.predict(make_photo(160, 240), channel_order='rgb')
    assert_detections(sample, (160, 240))
    for mask, (x1, y1, x2, y2) in zip(sample.pred_instances.masks, sample.pred_instances.bboxes.round().int().tolist()):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert abs(rows.min() - y1) <= 1 and abs(rows.max() + 1 - y2) <= 1
        assert abs(columns.min() - (x1 + 0.4 * (x2 - x1))) <= 3 and abs(columns.max() + 1 - x2) <= 1
    no_masks = load_model(save_detector(folder / 'bare.onnx', make_meta('mask_rcnn', masks=None)))
    assert_detections(no_masks.predict(make_photo(60, 90), channel_order='rgb'), (60, 90), has_masks=False)


def record_runs(model):
    """Return a list to which the inputs of each session run are appended."""
    calls, run = [], model.model.session.run
    model.model.session.run = lambda images, size: calls.append((images, size)) or run(images, size)
    return calls


@pytest.mark.parametrize('input_', ['uint8', 'float32'])
def test_fixed_input_size(input_, folder):
    """128 x 160 is more than the 128 pixels of the test pipeline in one direction, 96 x 96 is less in both."""
    for size in ((128, 160), (96, 96)):
        changes = dict(input=input_, size=size)
        model = load_model(save_detector(folder / 'fixed.onnx', make_meta('mask_rcnn', **changes), batch=2))
        assert model.model.session.size == size and model.model.session.batch == 2
        captured = record_runs(model)
        for image_size in SIZES:
            captured.clear()
            (sample,) = model.predict([make_photo(*image_size)], channel_order='rgb')
            ((images, _),) = captured
            assert images.shape == (2, 3, *size) and images.dtype == input_
            height, width = image_size
            # The boxes are fractions of the padded image.
            factor = min(128 / max(height, width), *(s / r for s, r in zip(size, image_size)))
            padded = [s / factor for s in size]
            expected = np.minimum(BOXES[:2] * np.float32([padded[1], padded[0]] * 2), [width, height] * 2)
            assert np.allclose(sample.pred_instances.bboxes, expected, atol=1.5)
            masks = sample.pred_instances.masks
            assert masks.shape == (2, height, width)
            for mask, fraction in zip(masks, (0.5, 0.25)):
                assert abs(mask.all(1).sum().item() - min(fraction * padded[0], height)) <= 2
            if images[0, 0].shape != image_size and factor * height < size[0] - 1:  # the padding is the mean, in RGB
                corner = images[0, :, -1, 0]
                assert np.allclose(corner, [123.675, 116.28, 103.53], atol=0.5 if input_ == 'uint8' else 1e-4)
        logits = save_segmentor(folder / 'fixed_seg.onnx', make_meta('upernet', size=size), with_logits=True)
        for image_size in SIZES:
            sample = load_model(logits).predict(make_photo(*image_size), channel_order='rgb')
            assert sample.pred_sem_seg.data.shape[1:] == image_size
            middle = image_size[1] // 2
            assert (sample.pred_sem_seg.data[0, :, : middle - 3] == 2).all()
            assert (sample.pred_sem_seg.data[0, :, middle + 3 :] == 1).all()


def test_raw_models_get_preprocessed_inputs(folder):
    model = load_model(save_detector(folder / 'raw.onnx', make_meta('mask_rcnn', input='raw')))
    captured = record_runs(model)
    sample = model.predict(make_photo(60, 100), channel_order='rgb')
    ((images, size),) = captured
    assert size is None and images.dtype == np.float32 and images.shape == (1, 3, 96, 128)  # 77 x 128, padded to 32
    assert np.allclose(images[0, 0, 0, 0], (51 - 123.675) / 58.395) and images[0, 0, -1, -1] == 0
    expected = np.minimum(BOXES[:2] * np.float32([128, 96, 128, 96]) * (100 / 128), [100, 60, 100, 60])
    assert np.allclose(sample.pred_instances.bboxes, expected, atol=0.3)
    assert_rows(sample.pred_instances.masks, 96 * 60 / 77, slack=1)
    seg = load_model(save_segmentor(folder / 'raw_seg.onnx', make_meta('upernet', input='raw')))
    assert_halves(seg.predict(make_photo(60, 100), channel_order='rgb').pred_sem_seg.data, (60, 100))


def test_unsupported_options_are_one_line_errors(detector, segmentor, folder, monkeypatch):
    def assert_refused(path, message, **options):
        amp = options.pop('amp_dtype', 'float32')
        with pytest.raises(UsageError, match=message):
            load_model(path, amp_dtype=amp).predict(make_photo(60, 90), channel_order='rgb', **options)

    assert_refused(segmentor, 'multiscale for segmentation is not in an exported model', multiscale=True)
    assert_refused(segmentor, 'tile needs logits, which the exported model does not return', tile=64)
    assert_refused(
        detector, 'amp_dtype float16: an exported model runs in the precision of its file', amp_dtype='float16'
    )
    assert_refused(save_program(folder / 'labels.pt2'), 'tile needs logits, which the exported model', tile=64)
    fixed_size = save_detector(folder / 'fixed2.onnx', make_meta('mask_rcnn', size=(96, 96)))
    assert_refused(fixed_size, 'multiscale at other sizes is not in an exported model', multiscale=True)
    with pytest.raises(UsageError, match='seg_logits needs logits'):
        load_model(segmentor).predict_arrays([make_photo(60, 90)], with_logits=True)
    with pytest.raises(UsageError, match="does not run on 'cuda': this onnxruntime is for CPUs: .* onnxruntime-gpu"):
        load_model(detector, device='cuda')
    with pytest.raises(UsageError, match="no device 'toaster'"):
        load_model(detector, device='toaster')
    with pytest.raises(UsageError, match='is a model for detection, the config is for segmentation'):
        load_model(detector, config='configs/demo/upernet.py')
    three_classes = save_detector(folder / 'three.onnx', make_meta('mask_rcnn', classes=('a', 'b', 'c')))
    with pytest.raises(UsageError, match='has 3 classes, the config has 4'):
        load_model(three_classes)
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(UsageError, match=r"needs ONNX Runtime: pip install 'convnext_dense\[export\]'"):
        load_model(detector)


def test_openvino_missing_or_on_another_device(detector, folder, monkeypatch):
    pytest.importorskip('openvino')
    path = save_openvino(folder / 'ov.xml', detector)
    with pytest.raises(UsageError, match="does not run on 'cuda': OpenVINO runs it on cpu"):
        load_model(path, device='cuda')
    bfloat16 = load_model(path, amp_dtype='bfloat16')
    assert np.allclose(
        bfloat16.predict(make_photo(60, 90), channel_order='rgb').pred_instances.scores[0], 0.2, atol=0.01
    )
    (folder / 'ov.bin').write_bytes(b'')
    with pytest.raises(UsageError, match='cannot be loaded by OpenVINO'):
        load_model(path)
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(UsageError, match=r"needs OpenVINO: pip install 'convnext_dense\[openvino\]'"):
        load_model(path)


def test_config_is_read_as_data(folder):
    def load_error(text):
        path = save_detector(folder / 'config.onnx', make_meta('mask_rcnn', config=text))
        with pytest.raises(UsageError) as error:
            load_model(path)
        assert '\n' not in str(error.value)
        return str(error.value)

    valid_config = make_meta('mask_rcnn').config
    assert 'contains no config: give the config' in load_error('')
    assert 'in its config is not registered' in load_error(
        valid_config.replace("type='MaskRCNN'", "type='subprocess.Popen'")
    )
    assert str(folder) in load_error(valid_config + "\nx = __import__('os').system('true')\n")
    path = save_detector(folder / 'config.onnx', make_meta('mask_rcnn', config=''))
    model = load_model(path, config='configs/demo/mask_rcnn.py')
    assert_detections(model.predict(make_photo(60, 90), channel_order='rgb'), (60, 90))


def test_model_that_the_runtime_refuses(folder):
    import onnx

    path = save_detector(folder / 'wrong.onnx')
    model = onnx.load(path)
    model.graph.node[0].op_type = 'NoSuchOperator'
    onnx.save(model, path)
    with pytest.raises(UsageError, match='cannot be loaded by ONNX Runtime .*NoSuchOperator') as error:
        load_model(path)
    assert '\n' not in str(error.value)
    segmentor = save_segmentor(folder / 'mismatched.onnx', make_meta('mask_rcnn'))
    with pytest.raises(UsageError, match='returns segmentation, not those of detection: export it again'):
        load_model(segmentor)


def test_runtime_errors_are_one_line(detector):
    model = ExportedModel(read_exported(detector), {})
    with pytest.raises(TrainingError, match='cannot be run on 1 x 4 x 4 pixels'):
        model.session.run(np.zeros((1, 2, 4, 4)), (4, 4))


def test_sessions_are_chosen_by_suffix(monkeypatch):
    assert set(SESSIONS) == {'.onnx', '.xml', '.pt2'}
    assert session_device('a.ONNX', None) == torch.device('cpu') == session_device('a.xml', 'cpu')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert session_device('a.onnx', None) == torch.device('cpu')  # onnxruntime for CPUs
    monkeypatch.setattr(SESSIONS['.onnx'], 'has_cuda', classmethod(lambda cls: True))
    assert session_device('a.onnx', None) == torch.device('cuda') and session_device('a.onnx', 'cuda:1').index == 1
