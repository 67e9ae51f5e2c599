"""tools/export.py: what it keeps, writes and refuses."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from mmcv.ops import DeformConv2d, RoIAlign
from torch import nn

from convnext_dense.checkpoints.exported_files import read_exported
from convnext_dense.cli import export as cli
from convnext_dense.datasets import toy_shapes
from convnext_dense.errors import UsageError
from convnext_dense.export import check
from convnext_dense.export.files import WRITERS, write_onnx
from convnext_dense.export.program import Traced, custom_operators
from helpers.tools import one_line_error


@pytest.fixture
def export(monkeypatch, files):
    """Run the tool's function; in the place of writing a file, that of the demo's Mask R-CNN is copied."""

    def copy(traced, path):
        shutil.copy(files('mask_rcnn')['.onnx'], path)

    def run(*args):
        monkeypatch.setattr(cli, 'trace', lambda *args, **kwargs: None)
        monkeypatch.setitem(WRITERS, '.onnx', copy)
        cli.export(cli.make_export_parser('').parse_args([*map(str, args)]))

    return run


def test_equal_file_is_kept_with_the_differences(export, checkpoints, tmp_path, capsys):
    export(checkpoints['mask_rcnn'], tmp_path / 'd.onnx')
    assert sorted(file.name for file in tmp_path.iterdir()) == ['d.onnx', 'd.onnx.check.json']
    rows = json.loads((tmp_path / 'd.onnx.check.json').read_text())
    assert [row['images'] for row in rows][-1] == [1, 224, 288] and len(rows) == len(check.SIZES) + 1
    assert sum(row['detections'] for row in rows) > 20 and max(row['box'] for row in rows) < 1e-2
    assert capsys.readouterr().out.splitlines()[-1] == f'wrote {tmp_path / "d.onnx"}'
    assert read_exported(tmp_path / 'd.onnx').meta.task == 'detection'


@pytest.mark.parametrize('detections, warns', [((0, 0), True), ((0, 3), False)])
def test_check_without_detections_is_said(detections, warns, monkeypatch, capsys):
    differences = [check.Difference((1, 64, 64), n, 0, 0.0, 0.0) for n in detections]
    monkeypatch.setattr(check, 'compare_file', lambda *args: differences)
    assert check.check_file(None, SimpleNamespace(task='detection'), check.ExportOptions()) is differences
    assert ('warning: the model detects nothing in the images' in capsys.readouterr().err) == warns


def test_file_that_differs_is_not_kept(export, checkpoints, tmp_path):
    """It is exact in all but a weight of the last layer of the boxes."""
    content = torch.load(checkpoints['mask_rcnn'], weights_only=False)
    content['state_dict']['roi_head.bbox_head.fc_cls.bias'][0] += 0.05
    torch.save(content, tmp_path / 'other.pth')
    (tmp_path / 'out').mkdir()
    with pytest.raises(UsageError, match='d.onnx does not compute what the model does .detections without a partner'):
        export(tmp_path / 'other.pth', tmp_path / 'out' / 'd.onnx')
    assert not [*(tmp_path / 'out').iterdir()]


def test_wrong_masks_are_detected():
    equal = check.Difference((1, 9, 9), detections=3, unmatched=0, box=0.0, score=0.0, mask_iou=1.0)
    check._check_tolerance([equal], check.FULL, check.Path('f'))
    for change in (dict(mask_iou=0.99), dict(unmatched=3), dict(pixels=0.9), dict(logits=0.1)):
        with pytest.raises(UsageError, match='does not compute .* unchecked by --no-check'):
            check._check_tolerance([equal, check.Difference(**{**vars(equal), **change})], check.FULL, check.Path('f'))


def test_int8(export, checkpoints, files, tmp_path, capsys, monkeypatch):
    """The file in float32 is proven equal first; of made weights, which find much in noise, most is found again."""
    toy_shapes.write_unlabeled(tmp_path / 'photos', 4, size=64)
    monkeypatch.setattr(cli, 'write_onnx', lambda traced, path: shutil.copy(files('mask_rcnn')['.onnx'], path))
    export(checkpoints['mask_rcnn'], tmp_path / 'd.onnx', '--int8', tmp_path / 'photos')
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'in float32:' and '0 without a partner' in lines[1]
    assert any(line.startswith('in 8-bit integers, calibrated on 4 images') for line in lines)
    model, original = onnx.load(tmp_path / 'd.onnx'), files('mask_rcnn')['.onnx']
    assert (tmp_path / 'd.onnx').stat().st_size < 0.4 * original.stat().st_size
    kinds = {node.op_type for node in model.graph.node}
    assert {'QuantizeLinear', 'DequantizeLinear'} <= kinds
    assert read_exported(tmp_path / 'd.onnx').meta == read_exported(original).meta
    rows = json.loads((tmp_path / 'd.onnx.check.json').read_text())
    n_detections = sum(row['detections'] for row in rows)
    assert sum(row['unmatched'] for row in rows) < n_detections  # of 2 x found


def test_operator_without_onnx_support_is_reported(tmp_path):
    torch.library.define('convnext_dense_tests::strange', '(Tensor x) -> Tensor')
    torch.library.impl('convnext_dense_tests::strange', 'CompositeExplicitAutograd', torch.clone)
    torch.library.register_fake('convnext_dense_tests::strange', torch.empty_like)

    class StrangeNeck(nn.Module):
        def forward(self, images):
            return torch.ops.convnext_dense_tests.strange(images)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.neck = StrangeNeck()

        def forward(self, images):
            return self.neck(images) + 1

    program = torch.export.export(Model(), (torch.zeros(1, 3, 8, 8),))
    message = r'the operator convnext_dense_tests.strange.default of neck \(StrangeNeck\) is not supported by ONNX'
    with pytest.raises(UsageError, match=message):
        write_onnx(Traced(Model(), program, ('logits',), None), tmp_path / 'f.onnx')


def test_module_of_mmcv_that_cannot_be_traced_is_named():
    neck = nn.Sequential(nn.Conv2d(3, 3, 1), DeformConv2d(3, 3, 1))
    assert custom_operators(neck) == 'torch.export does not know DeformConv2d of mmcv.ops, which is its 1'
    assert custom_operators(nn.Sequential(RoIAlign(7))) == ''


@pytest.mark.parametrize(
    'suffix, package, extra', [('.onnx', 'onnxscript', 'export'), ('.xml', 'openvino', 'openvino')]
)
def test_missing_package_is_reported(suffix, package, extra, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"{package} is not installed .*: pip install 'convnext_dense\[{extra}\]'"):
        WRITERS[suffix](None, tmp_path / f'd{suffix}')
    assert not [*tmp_path.iterdir()]


def test_exported_models_are_refused(tmp_path):
    arguments = cli.make_export_parser('').parse_args(['a.onnx', str(tmp_path / 'b.xml')])
    with pytest.raises(UsageError, match=r'a.onnx is exported already: give the checkpoint'):
        cli.export(arguments)


@pytest.mark.parametrize(
    'args, message',
    [
        (['d.engine'], 'd.engine: give a file that ends in .onnx, .xml, .pt2'),
        (['there.onnx'], 'there.onnx exists: remove it, or give another name'),
        (['d.xml'], 'd.bin exists: remove it, or give another name'),
        (['nowhere/d.onnx'], 'there is no folder nowhere: make it, or give another path'),
        (['d.pt2', '--int8', '.'], '--int8 is for .onnx and .xml files without --half'),
        (['d.onnx', '--int8', '.', '--half'], '--int8 is for .onnx and .xml files without --half'),
        (['d.onnx', '--int8', 'photos'], "no image or folder 'photos'"),
        (['d.onnx', '--size', '8', '8'], '--size 8 8: give two sizes from 32 to 8192'),
    ],
)
def test_bad_arguments(run_tool, checkpoints, tmp_path, args, message):
    for name in ('there.onnx', 'd.bin'):
        (tmp_path / name).write_text('mine')
    one_line_error(run_tool('export.py', checkpoints['mask_rcnn'], *args), message)
    assert sorted(file.name for file in tmp_path.iterdir()) == ['d.bin', 'there.onnx']
    assert (tmp_path / 'there.onnx').read_text() == 'mine'


def test_mask_iou_tolerates_one_pixel():
    """Of 400 pixels one is 0.25 %, of which an IoU of 0.999 would allow none."""
    mask = np.zeros((40, 40), bool)
    mask[:20, :20] = True
    for count, is_equal in ((0, True), (1, True), (2, False), (20, False)):
        other_mask = mask.copy()
        other_mask[20, :count] = True
        assert (check.mask_iou(mask, other_mask) >= check.FULL.mask_iou) == is_equal
    assert check.mask_iou(mask, ~mask) == 0
