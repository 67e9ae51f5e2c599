"""RoIAlign and NMS of `ops` against mmcv's, and the arguments that they refuse."""

import pytest
import torch
from mmcv.ops import nms as mmcv_nms
from mmcv.ops.roi_align import roi_align as mmcv_roi_align
from torch.library import opcheck

from convnext_dense.ops import box_ops, head_kernels

pytestmark = pytest.mark.skipif(not head_kernels.available(), reason='the kernels are not for this machine')
SCALES = [1 / 4, 1 / 8]
C = 48


@pytest.fixture(params=[*head_kernels.VARIANTS])
def variant(request, monkeypatch):
    """Each compiled variant that runs on this processor."""
    other_variants = {k: v for k, v in head_kernels.VARIANTS.items() if k != request.param}
    monkeypatch.setattr(head_kernels, 'VARIANTS', {request.param: head_kernels.VARIANTS[request.param]})
    head_kernels._library.cache_clear()
    if not head_kernels.available():
        pytest.skip(f'no {request.param} here')
    assert head_kernels.variant() == request.param and other_variants
    yield request.param
    monkeypatch.undo()
    head_kernels._library.cache_clear()


def make_feats(channels=C, images=2, dtype=torch.float32, channels_last=True):
    torch.manual_seed(0)
    feats = [torch.randn(images, channels, 30 // 2**i, 41 // 2**i).to(dtype) for i in range(2)]
    return [f.contiguous(memory_format=torch.channels_last) if channels_last else f for f in feats]


def make_rois(images=2, n=16):
    """RoIs of all sizes, some beyond the image, and their levels."""
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(n, 2, generator=generator) * torch.tensor([164.0, 120.0]) * 1.3 - 20
    sizes = torch.rand(n, 2, generator=generator).pow(3) * 190
    index = torch.randint(images, (n, 1), generator=generator).float()
    rois = torch.cat([index, corners, corners + sizes], 1)
    special = [
        [0, 0, 0, 164, 120],
        [1, 5, 6, 5, 6],
        [0, 10, 10, 60, 10],
        [1, -500, 3, -400, 9],
        [0, 163, 119, 400, 300],
    ]
    return torch.cat([rois, torch.tensor(special)]), torch.randint(2, (n + len(special),), generator=generator)


def reference(feats, rois, levels, output_size, sampling_ratio, aligned):
    """mmcv's RoIAlign, level by level."""
    out = feats[0].new_zeros(len(rois), feats[0].shape[1], *output_size)
    for i, feat in enumerate(feats):
        rows = (levels == i).nonzero().flatten()
        settings = (output_size, SCALES[i], sampling_ratio, 'avg', aligned)
        out = out.index_copy(0, rows, mmcv_roi_align(feat.contiguous(), rois[rows], *settings))
    return out


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 1, 2])
@pytest.mark.parametrize('output_size', [(7, 7), (14, 14), (3, 5), (1, 1)])
def test_features_and_gradients_equal_mmcv(variant, output_size, sampling_ratio, aligned):
    rois, levels = make_rois()
    settings = (output_size, sampling_ratio, aligned)
    for channels, channels_last in ((16, True), (C, False), (272, True)):  # 272: one vector more than whole blocks
        feats = [f.requires_grad_() for f in make_feats(channels, channels_last=channels_last)]
        expected = reference(feats, rois, levels, *settings)
        grad = torch.randn(expected.shape)
        grads = torch.autograd.grad(expected, feats, grad)
        for features_last in (False, True):
            actual = box_ops.roi_align(feats, rois, levels, SCALES, *settings, features_last)
            memory_format = torch.channels_last if features_last else torch.contiguous_format
            assert actual.is_contiguous(memory_format=memory_format)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
            for f, e in zip(torch.autograd.grad(actual, feats, grad), grads):
                torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5 * e.abs().max().item())


def test_features_of_a_linear_map_equal_the_formula():
    """Of a map that is linear in its coordinates, the average of a bin is the value at its center."""
    y, x = torch.meshgrid(torch.arange(30.0), torch.arange(41.0), indexing='ij')
    feat = (3 * y + 5 * x).expand(1, 16, 30, 41)
    rois = torch.tensor([[0, 20.0, 24.0, 104.0, 80.0]])
    out = box_ops.roi_align([feat], rois, torch.zeros(1).long(), [1 / 4], (7, 7), 0, True, False)
    centers_y, centers_x = (
        (24 + 56 * (torch.arange(7) + 0.5) / 7) / 4 - 0.5,
        (20 + 84 * (torch.arange(7) + 0.5) / 7) / 4 - 0.5,
    )
    torch.testing.assert_close(out[0, 9], 3 * centers_y[:, None] + 5 * centers_x, rtol=1e-5, atol=1e-4)


def test_bfloat16_features_are_read_without_rounding(variant):
    rois, levels = make_rois()
    feats = [f.requires_grad_() for f in make_feats(dtype=torch.bfloat16)]
    copies = [f.detach().float().requires_grad_() for f in feats]
    actual, expected = (box_ops.roi_align(x, rois, levels, SCALES, (7, 7), 0, True, False) for x in (feats, copies))
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)
    grad = torch.randn(actual.shape)
    for f, e in zip(torch.autograd.grad(actual, feats, grad), torch.autograd.grad(expected, copies, grad)):
        assert f.dtype == torch.bfloat16 and torch.equal(f, e.bfloat16())


def test_results_are_bitwise_equal_for_any_number_of_threads():
    rois, levels = make_rois()
    results, threads = [], torch.get_num_threads()
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        feats = [f.requires_grad_() for f in make_feats()]
        out = box_ops.roi_align(feats, rois, levels, SCALES, (7, 7), 0, True, False)
        results.append([out, *torch.autograd.grad(out.square().sum(), feats)])
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_levels_without_rois_and_no_rois():
    feats = [f.requires_grad_() for f in make_feats()]
    rois, levels = make_rois()
    for n in (0, 1):
        out = box_ops.roi_align(feats, rois[:n], 0 * levels[:n], SCALES, (7, 7), 0, True, False)
        assert out.shape == (n, C, 7, 7)
        grads = torch.autograd.grad(out.sum(), feats)
        assert [bool(g.any()) for g in grads] == [n > 0, False]


@pytest.mark.parametrize('requires_grad', [False, True])
def test_opcheck(requires_grad):
    rois, levels = make_rois(n=3)
    feats = [f.requires_grad_(requires_grad) for f in make_feats()]
    for features_last in (False, True):
        opcheck(box_ops.roi_align, (feats, rois, levels, SCALES, [7, 7], 0, True, features_last))
    sizes = ([f.shape[2] for f in feats], [f.shape[3] for f in feats])
    grad = torch.randn(len(rois), C, 7, 7)
    opcheck(box_ops.roi_align_backward, (grad, rois, levels, SCALES, [7, 7], 0, True, 2, *sizes))
    opcheck(box_ops.nms, (rois[:, 1:], torch.rand(len(rois)), 0.5, 0))


def test_unsupported_inputs():
    rois, feats = make_rois()[0], make_feats()
    assert box_ops.supports_roi_align(feats, rois)
    for unsupported in (
        [f.double() for f in feats],
        [f.half() for f in feats],
        [f[:, :40] for f in feats],
        [feats[0], feats[1][:1]],
        [feats[0], feats[1].bfloat16()],
        [f[..., :0] for f in feats],
        [f.to('meta') for f in feats],
        [],
    ):
        assert not box_ops.supports_roi_align(unsupported, rois)
        with pytest.raises((RuntimeError, NotImplementedError)):
            box_ops.roi_align(unsupported, rois, make_rois()[1], SCALES[: len(unsupported)], (7, 7), 0, True, False)
    assert not box_ops.supports_roi_align(feats, rois.double())
    assert not box_ops.supports_roi_align([torch._neg_view(f) for f in feats], rois)


@pytest.mark.parametrize(
    'column, value, message',
    [
        (0, 2.0, 'image index .* out of range'),
        (0, -1.0, 'image index .* out of range'),
        (0, float('nan'), 'image index .* out of range'),
        (1, float('nan'), 'negative size'),
        (3, float('inf'), 'negative size'),
        (3, -1e9, 'negative size'),
        (2, -1e30, 'negative size'),
    ],
)
def test_invalid_rois_are_refused(column, value, message):
    rois, levels = make_rois()
    rois[3, column] = value
    with pytest.raises(RuntimeError, match=message):
        box_ops.roi_align(make_feats(), rois, levels, SCALES, (7, 7), 0, True, False)
    with pytest.raises(RuntimeError, match=message):
        sizes = ([30, 15], [41, 20])
        box_ops.roi_align_backward(torch.ones(len(rois), C, 7, 7), rois, levels, SCALES, (7, 7), 0, True, 2, *sizes)


def test_invalid_arguments_are_refused():
    rois, levels = make_rois()
    call = dict(rois=rois, levels=levels, spatial_scales=SCALES, output_size=(7, 7), sampling_ratio=0)
    for change in (
        dict(levels=levels + 2),
        dict(levels=levels - 1),
        dict(levels=levels[:-1]),
        dict(levels=levels.int()),
        dict(rois=rois[:, :4]),
        dict(rois=rois.double()),
        dict(spatial_scales=SCALES[:1]),
        dict(spatial_scales=[0.25, 0.0]),
        dict(output_size=(0, 7)),
        dict(output_size=(7, 1 << 13)),
        dict(sampling_ratio=-1),
        dict(sampling_ratio=1 << 13),
    ):
        with pytest.raises(RuntimeError):
            box_ops.roi_align(make_feats(), **(call | change), aligned=True, channels_last=False)
    grad, sizes = torch.ones(len(rois), C, 7, 7), ([30, 15], [41, 20])
    for unsupported in (grad[1:], grad[..., :5], grad.double(), grad[:, :40], grad.to('meta')):
        with pytest.raises(RuntimeError):
            box_ops.roi_align_backward(unsupported, *call.values(), True, 2, *sizes)


# ---- NMS -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.0, 0.3, 0.7, 1.0])
def test_kept_boxes_equal_mmcv(variant, threshold, offset):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        n = [0, 1, 2, 17, 300][seed % 5]
        corners, sizes = (torch.rand(n, 2, generator=generator) * 50 for _ in range(2))
        if seed % 2:  # equal boxes, overlaps that are a threshold, scores that are equal
            corners, sizes = corners.div(10).round(), sizes.div(10).round()
        scores = torch.rand(n, generator=generator)
        scores = scores.mul(10).round() if seed % 3 == 0 else scores
        candidates = torch.cat([corners, corners + sizes], 1)
        expected = mmcv_nms(candidates, scores, threshold, offset)[1]
        assert torch.equal(box_ops.nms(candidates, scores, threshold, offset), expected)


def test_nan_boxes_are_kept_as_in_mmcv():
    candidates = torch.tensor([[0, 0, 9, 9], [0, 0, 9, float('nan')], [1, 1, float('inf'), 9], [0, 0, 9, 8.5]])
    for order in ([0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 1, 0]):
        scores = torch.tensor(order).float()
        assert torch.equal(box_ops.nms(candidates, scores, 0.5, 0), mmcv_nms(candidates, scores, 0.5)[1])


def test_nms_refuses_invalid_arguments():
    candidates, scores = torch.rand(5, 4), torch.rand(5)
    for invalid_args in (
        (candidates.double(), scores, 0.5, 0),
        (candidates[:, :3], scores, 0.5, 0),
        (candidates, scores[1:], 0.5, 0),
        (candidates, scores, 0.5, 2),
        (candidates.to('meta'), scores, 0.5, 0),
    ):
        with pytest.raises(RuntimeError):
            box_ops.nms(*invalid_args)
