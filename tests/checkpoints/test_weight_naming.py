"""Weights of every source load, convert and are distinguished; damaged ones are refused."""

import bz2
import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convnext_dense import load_backbone
from convnext_dense.checkpoints import hub, load_checkpoint, open_checkpoint, plan_load
from convnext_dense.checkpoints.convert import EXPORT_FORMATS, convert
from convnext_dense.checkpoints.naming import NAMING_SCHEMES, detect_scheme
from convnext_dense.errors import UsageError
from convnext_dense.models.convnext import ARCHS, ConvNeXt
from helpers.foreign_weights import DINOV3, HEADLESS, TIMM, TRANSFORMERS, original_weights, rename_to_library, save_pth
from helpers.paths import ROOT
from helpers.tools import one_line_error

REFERENCE = json.loads((ROOT / 'tests/data/foreign_names.json').read_text())
SMALL = dict(depths=(1, 2, 4, 1), channels=(8, 16, 24, 32))
SIZES = ('tiny', 'small', 'base', 'large', 'xlarge')


def eighth_width(arch: str) -> dict:
    """An architecture at an eighth of its width."""
    return dict(depths=ARCHS[arch]['depths'], channels=tuple(c // 8 for c in ARCHS[arch]['channels']))


def compute_features(arch, weights_file, **settings):
    torch.manual_seed(0)
    model = ConvNeXt(arch, **settings).eval()
    load_backbone(model, weights_file)
    with torch.no_grad():
        return model(torch.randn(1, settings.get('in_channels', 3), 64, 64))


@pytest.mark.parametrize('library', REFERENCE)
def test_library_names_and_shapes_equal_the_reference(library):
    with torch.device('meta'):
        model = ConvNeXt('tiny', out_indices=-1)
    tiny = {n: t.shape for n, t in model.state_dict().items() if not n.startswith('norm')}
    n_classes = 2 if 'ImageClassification' in library else 1000
    tiny |= {'norm.weight': (768,), 'norm.bias': (768,), 'head.weight': (n_classes, 768), 'head.bias': (n_classes,)}
    with torch.device('meta'):
        renamed = rename_to_library({n: torch.empty(shape) for n, shape in tiny.items()}, library)
    assert {n: list(t.shape) for n, t in renamed.items()} == REFERENCE[library]
    actual = detect_scheme(REFERENCE[library])
    assert actual.depths == (3, 3, 9, 3) and not actual.unknown and not actual.other_names
    assert set(actual.names.values()) == {n for n in tiny if library not in HEADLESS or not n.startswith('head.')}


@pytest.fixture(scope='module', params=SIZES)
def original(request, tmp_path_factory):
    """An architecture, weights with the original names, and features with them."""
    arch = eighth_width(request.param)
    weights = original_weights(arch)
    file = save_pth(tmp_path_factory.mktemp('original') / 'original.pth', {'model': weights})
    return arch, weights, compute_features(arch, file)


@pytest.mark.parametrize('library', REFERENCE)
def test_features_with_library_weights_equal_the_original(tmp_path, library, original):
    arch, weights, features = original
    library_file = save_pth(tmp_path / 'theirs.pth', rename_to_library(weights, library))
    assert all(map(torch.equal, compute_features(arch, library_file), features))


@pytest.mark.parametrize(
    'change',
    [
        lambda w: {f'visual.trunk.{n}': t for n, t in w.items()},  # OpenCLIP
        lambda w: {re.sub(r'^(stem|stages)\.', r'\1_', n): t for n, t in w.items() if not n.startswith('head')},
        lambda w: {n: t[..., None, None] if re.search(r'fc\d\.weight', n) else t for n, t in w.items()},  # 1x1 conv
        lambda w: {'state_dict': {f'module._orig_mod.{n}': t for n, t in w.items()}},
        lambda w: {n.replace('stages.2.', 'stages.2._orig_mod.'): t for n, t in w.items()},
        lambda w: {'model': w, 'model_ema': {n: t + 1 for n, t in w.items()}},
    ],
    ids=['open_clip', 'features_only', 'conv_mlp', 'wrapped', 'wrapped_inside', 'beside_ema'],
)
def test_variants_of_timm(tmp_path, change):
    weights = original_weights(SMALL)
    timm_file = change(rename_to_library(weights, 'timm 1.0.31 convnext_tiny'))
    timm_file = save_pth(tmp_path / 'theirs.pth', timm_file)
    original_file = save_pth(tmp_path / 'original.pth', {'model': weights})
    for expected, actual in zip(compute_features(SMALL, original_file), compute_features(SMALL, timm_file)):
        assert torch.equal(expected, actual)


def test_dinov3_names_of_the_first_release(tmp_path):
    weights = original_weights(SMALL)
    dinov3_weights = {n.removeprefix('model.'): t for n, t in rename_to_library(weights, DINOV3).items()}
    assert 'stages.0.layers.0.gamma' in dinov3_weights and 'layer_norm.weight' in dinov3_weights
    original_file = save_pth(tmp_path / 'original.pth', {'model': weights})
    for expected, actual in zip(
        compute_features(SMALL, original_file),
        compute_features(SMALL, save_pth(tmp_path / 'theirs.pth', dinov3_weights)),
    ):
        assert torch.equal(expected, actual)


def test_trained_segmentor_of_transformers(tmp_path):
    """Its backbone's norms of hidden states are our output norms."""
    weights = rename_to_library(original_weights(SMALL), TRANSFORMERS)
    segmentor_weights = {
        n.replace('convnext.', 'backbone.'): t for n, t in weights.items() if 'convnext.layernorm' not in n
    }
    norms = {f'norm{i}.{leaf}': torch.rand(c) for i, c in enumerate(SMALL['channels']) for leaf in ('weight', 'bias')}
    segmentor_weights |= {f'backbone.hidden_states_norms.stage{int(n[4]) + 1}{n[5:]}': t for n, t in norms.items()}
    segmentor_weights['decode_head.classifier.weight'] = torch.ones(1)
    model = ConvNeXt(SMALL)
    report = load_backbone(model, save_pth(tmp_path / 'w.pth', segmentor_weights))
    assert (
        '0 kept at initialization' in report and 'trained detector or segmentor in the names of transformers' in report
    )
    assert all(torch.equal(model.state_dict()[n], t) for n, t in norms.items())


def test_v2_through_every_entry_point(tmp_path):
    weights = original_weights(SMALL, grn=True)
    variants = {
        'fcmae': {
            'model': {n: t[0, 0] if '.grn.' in n else t for n, t in weights.items() if n[:4] not in ('head', 'norm')}
        },
        'timm': {n: t.flatten() if '.grn.' in n else t for n, t in rename_to_library(weights, TIMM).items()},
        'transformers': {
            n.replace('convnext.', 'convnextv2.'): t for n, t in rename_to_library(weights, TRANSFORMERS).items()
        },
    }
    expected = compute_features(SMALL, save_pth(tmp_path / 'original.pth', {'model': weights}), use_grn=True)
    for name, content in variants.items():
        file = save_pth(tmp_path / f'{name}.pth', content)
        assert 'V2' in open_checkpoint(file).arch
        for e, a in zip(expected, compute_features(SMALL, file, use_grn=True)):
            assert torch.equal(e, a)
        with pytest.raises(UsageError, match='is ConvNeXt V2'):
            plan_load(ConvNeXt(SMALL), file)


def test_dinov3_final_norm(tmp_path):
    weights = {n: t for n, t in original_weights(SMALL).items() if not n.startswith('head.')}
    with_final_norm = weights | {f'norms.3.{leaf}': weights[f'norm.{leaf}'] for leaf in ('weight', 'bias')}
    for file, title in (
        (save_pth(tmp_path / 'meta.pth', with_final_norm), 'DINOv3 by Meta'),
        (save_pth(tmp_path / 'hf.pth', rename_to_library(weights, DINOV3)), 'DINOv3 by transformers'),
    ):
        model = ConvNeXt(SMALL)
        report = load_backbone(model, file)
        assert title in report and '8 kept at initialization' in report and (model.norm3.weight == 1).all()
        report = load_backbone(model, file, final_norm='reuse')
        assert '6 kept at initialization' in report and 'the final norm is used as output norm 3' in report
        assert torch.equal(model.norm3.weight, weights['norm.weight'])
        model = ConvNeXt(SMALL, init_cfg=dict(type='Pretrained', checkpoint=str(file), final_norm='reuse'))
        model.init_weights()
        assert torch.equal(model.norm3.bias, weights['norm.bias'])
    del with_final_norm['norm.bias']
    with pytest.raises(UsageError, match='no final norm'):
        load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 'none.pth', with_final_norm), final_norm='reuse')
    with pytest.raises(UsageError, match="final_norm='keep'"):
        load_backbone(ConvNeXt(SMALL), file, final_norm='keep')


@pytest.mark.parametrize('in_channels', [1, 2, 4, 6])
def test_stem_is_adapted_to_other_in_channels(tmp_path, in_channels):
    file = save_pth(tmp_path / 'w.pth', {'model': original_weights(SMALL)})
    model = ConvNeXt(SMALL, in_channels=in_channels)
    assert f'stem is adapted from 3 to {in_channels} input channels' in load_backbone(model, file)
    rgb = torch.load(file)['model']['downsample_layers.0.0.weight']
    actual = model.downsample_layers[0][0].weight
    if in_channels == 1:
        torch.testing.assert_close(actual[:, 0], rgb[:, 0] + rgb[:, 1] + rgb[:, 2])
    else:
        for i in range(in_channels):
            torch.testing.assert_close(actual[:, i], rgb[:, i % 3] * 3 / in_channels)


def test_containers(tmp_path):
    weights = original_weights(SMALL)
    expected = compute_features(SMALL, save_pth(tmp_path / 'original.pth', {'model': weights}))
    save_file(weights, tmp_path / 'w.safetensors')
    names, index = sorted(weights), {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: weights[n] for n in part}, tmp_path / f'model-{i}.safetensors')
        index |= dict.fromkeys(part, f'model-{i}.safetensors')
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=index)))
    torch.save(weights, tmp_path / 'old.bin', _use_new_zipfile_serialization=False)
    for name in ('w.safetensors', 'model.safetensors.index.json', 'old.bin'):
        for e, a in zip(expected, compute_features(SMALL, tmp_path / name)):
            assert torch.equal(e, a)
    (tmp_path / 'model-1.safetensors').unlink()
    with pytest.raises(UsageError, match='model-1.safetensors.*not next to it'):
        load_checkpoint(tmp_path / 'model.safetensors.index.json')
    index['one.more'] = 'model-0.safetensors'
    save_file({n: weights[n] for n in names[1::2]}, tmp_path / 'model-1.safetensors')
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=index)))
    with pytest.raises(UsageError, match='one.more'):
        load_checkpoint(tmp_path / 'model.safetensors.index.json')
    (tmp_path / 'x.index.json').write_text(json.dumps(dict(weight_map={'a': '../original.pth'})))
    with pytest.raises(UsageError, match='original.pth'):
        load_checkpoint(tmp_path / 'x.index.json')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast(tmp_path, dtype):
    weights = {n: t.to(dtype) for n, t in original_weights(SMALL).items()}
    model = ConvNeXt(SMALL)
    load_backbone(model, save_pth(tmp_path / 'w.pth', weights))
    assert torch.equal(model.stages[2][1].pwconv1.weight, weights['stages.2.1.pwconv1.weight'].float())


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_nan_and_inf_are_refused(tmp_path, value):
    weights = original_weights(SMALL)
    weights['stages.2.1.pwconv1.weight'][3, 4] = value
    with pytest.raises(UsageError, match='stages.2.1.pwconv1.weight contains NaN or Inf'):
        load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 'w.pth', weights))


def test_large_values_are_finite(tmp_path):
    weights = original_weights(SMALL)
    weights['stages.2.1.pwconv1.weight'][:] = 3e38
    load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 'w.pth', weights))


def test_complex_weights(tmp_path):
    weights = {n: t.to(torch.complex64) for n, t in original_weights(SMALL).items()}
    with pytest.raises(UsageError, match='is torch.complex64: complex weights cannot be loaded'):
        load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 'w.pth', weights))
    weights = original_weights(SMALL)
    weights['norm.bias'] = torch.ones(32, dtype=torch.complex64).conj()
    with pytest.raises(UsageError, match='a conjugate or negative view'):
        load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 'w.pth', weights))


def test_quantized_weights(tmp_path):
    weights = {n: (t * 100).to(torch.int8) for n, t in original_weights(SMALL).items()}
    with pytest.raises(UsageError, match='int8'):
        load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 'w.pth', weights))
    weights = {n: t.to(torch.float8_e4m3fn) for n, t in original_weights(SMALL).items()}
    with pytest.raises(UsageError, match='float8'):
        load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 'w.pth', weights))


def test_error_names_likely_cause(tmp_path):
    weights = original_weights(eighth_width('small'))
    with pytest.raises(
        UsageError, match=r'is ConvNeXt depths \(3, 3, 27, 3\).* does not fit the config.*\(3, 3, 9, 3\)'
    ):
        load_backbone(ConvNeXt(eighth_width('tiny')), save_pth(tmp_path / 'w.pth', weights))
    weights = original_weights(SMALL)
    weights['stages.2.1.pwconv_1.weight'] = weights.pop('stages.2.1.pwconv1.weight')
    with pytest.raises(
        UsageError, match=r'1 missing \(stages.2.1.pwconv1.weight \(did you mean stages.2.1.pwconv_1.weight\?\)'
    ):
        load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 'w.pth', weights))
    detector_weights = {f'backbone.{n}': t for n, t in original_weights(SMALL).items() if n[:4] not in ('norm', 'head')}
    report = load_backbone(
        ConvNeXt(SMALL), save_pth(tmp_path / 'd.pth', {**detector_weights, 'neck.weight': torch.ones(1)})
    )
    assert 'the backbone of a trained detector' in report
    two_models = {f'{role}.{n}': t for role in ('student', 'teacher') for n, t in original_weights(SMALL).items()}
    with pytest.raises(UsageError, match=r'several ConvNeXts \(student., teacher.\)'):
        load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 't.pth', two_models))
    with pytest.raises(UsageError, match='no ConvNeXt weights by the names in it .*layer1'):
        load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 'r.pth', {'layer1.0.conv1.weight': torch.ones(1)}))


FOREIGN_FILES = {
    'a folder': lambda p: p.mkdir(),
    'empty': lambda p: p.touch(),
    'a gzip archive': lambda p: p.write_bytes(gzip.compress(b'weights')),
    'a web page': lambda p: p.write_text('\n<!DOCTYPE html><html>'),
    'a pointer of Git LFS': lambda p: p.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:'),
    'a bzip2 archive': lambda p: p.write_bytes(bz2.compress(b'weights')),
    'JSON': lambda p: p.write_text('{"a": 1}'),
    'an HDF5 file': lambda p: p.write_bytes(b'\x89HDF\r\n\x1a\n' + bytes(64)),
    'an ONNX or TensorFlow model': lambda p: p.write_bytes(b'\x08\x07\x12\x07pytorch\x1a\x05'),
    'contains a list': lambda p: torch.save([1], p),
    'cannot be read safely': lambda p: p.write_bytes(b'\xff' * 100),
}


@pytest.mark.parametrize('message', FOREIGN_FILES)
def test_foreign_file_types_are_named(tmp_path, message):
    FOREIGN_FILES[message](tmp_path / 'w.pth')
    with pytest.raises(UsageError, match=message):
        load_checkpoint(tmp_path / 'w.pth')


def test_safetensors_header_with_false_lengths_is_refused(tmp_path):
    """False lengths in a header must not hang or allocate memory."""
    header = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    (tmp_path / 'w.safetensors').write_bytes(len(header).to_bytes(8, 'little') + header + bytes(64))
    (tmp_path / 'v.safetensors').write_bytes((2**62).to_bytes(8, 'little') + header)
    for name in ('w', 'v'):
        with pytest.raises(UsageError, match='cannot be read safely'):
            load_checkpoint(tmp_path / f'{name}.safetensors')


def try_load(file, expected, model=None) -> bool:
    """Whether a file loads. Asserts that the values are `expected` if it does, and that nothing changed if not. A model
    may be reused as long as nothing loads."""
    model = model or ConvNeXt(SMALL)
    initial = {n: t.clone() for n, t in model.state_dict().items()}
    try:
        load_backbone(model, file)
    except UsageError as error:
        assert '\n' not in str(error)
        assert all(torch.equal(t, initial[n]) for n, t in model.state_dict().items())
        return False
    if expected is not None:
        for n, t in model.state_dict().items():
            assert n.startswith('norm') or torch.equal(t, expected[n]), n
    return True


@pytest.mark.parametrize('library', [None, *REFERENCE])
def test_every_damaged_tensor_is_refused(tmp_path, library):
    weights = original_weights(SMALL)
    library_weights = weights if library is None else rename_to_library(weights, library)
    trunk = {
        n for n in library_weights if not re.search(r'^(norm3?|head|classifier|convnext\.layernorm|layer_norm)\.', n)
    }
    changes = [
        lambda w, n: w.pop(n),
        lambda w, n: w.update({f'{n}_': w.pop(n)}),
        lambda w, n: w.update({n: w[n].transpose(0, -1)}) if len(set(w[n].shape)) > 1 and w[n].ndim > 1 else w.pop(n),
        lambda w, n: w.update({n: torch.cat([w[n], w[n]])}),
        lambda w, n: w.update({n: w[n][:-1]}),
    ]
    model = ConvNeXt(SMALL)
    for name in trunk:
        for change in changes:
            damaged_weights = dict(library_weights)
            change(damaged_weights, name)
            # A vector with another shape, (1, 1, C) instead of (C, 1, 1), loads correctly.
            is_loaded = try_load(save_pth(tmp_path / 'w.pth', damaged_weights), weights, model)
            assert not is_loaded or name.endswith('layer_scale'), name


@pytest.mark.parametrize(
    'change',
    [
        lambda w: w.pop('backbone.norm2.weight'),
        lambda w: w.update({'backbone.norm2.wieght': w.pop('backbone.norm2.weight')}),
        lambda w: [w.pop(f'backbone.norm1.{leaf}') for leaf in ('weight', 'bias')],
        lambda w: w.update({'backbone.norm3.weight': w['backbone.norm3.weight'][:-1]}),
        lambda w: w.update({'backbone.norm4.weight': w['backbone.norm3.weight']}),
    ],
)
def test_partial_output_norms_are_refused(tmp_path, change):
    weights = {f'backbone.{n}': t for n, t in ConvNeXt(SMALL).state_dict().items()} | {'neck.weight': torch.ones(1)}
    assert '0 kept at initialization' in load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 'w.pth', weights))
    change(weights)
    with pytest.raises(UsageError, match=r'norm\d.w'):
        load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 'w.pth', weights))


def test_numpy_values_in_meta(tmp_path):
    """As in mmengine's checkpoints: the best score so far, of any type."""
    content = {'state_dict': original_weights(SMALL)}
    content |= {'meta': [np.float32(1), np.bool_(True), np.int32(3), np.str_('x'), np.ones(2, np.float32)]}
    load_backbone(ConvNeXt(SMALL), save_pth(tmp_path / 'w.pth', content))


@pytest.mark.parametrize('ending', ['.pth', '.safetensors', '.bin'])
def test_damaged_files_are_refused_or_load_correctly(tmp_path, ending):
    """Files cut at every tensor's end and elsewhere, and with flipped bits."""
    weights = original_weights(SMALL)
    valid_file = tmp_path / f'whole{ending}'
    if ending == '.safetensors':
        save_file(weights, valid_file)
    else:
        torch.save(weights, valid_file, _use_new_zipfile_serialization=ending == '.pth')
    data, file = valid_file.read_bytes(), tmp_path / f'w{ending}'
    generator = torch.Generator().manual_seed(0)
    cuts, start = set(), 0
    for tensor in weights.values():  # offset of the end of each tensor in the file
        start = data.find(tensor.contiguous().numpy().tobytes())
        cuts.add(start + tensor.numel() * 4)
    cuts |= set(torch.randint(0, len(data), (100,), generator=generator).tolist())
    unloaded_model = ConvNeXt(SMALL)
    for cut in sorted(cuts):
        if cut < len(data):
            file.write_bytes(data[:cut])
            assert not try_load(file, weights, unloaded_model), cut
    model = ConvNeXt(SMALL)
    structure = len(data) // 8 if ending == '.safetensors' else len(data)
    for _ in range(400):
        damaged_data = bytearray(data)
        pos = int(torch.randint(0, structure, (1,), generator=generator))
        damaged_data[pos] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
        file.write_bytes(damaged_data)
        for parameter in model.parameters():  # what does not load would differ from all weights
            torch.nn.init.constant_(parameter, 7.0)
        if try_load(file, None, model):
            n_different = [(t != weights[n]).sum() for n, t in model.state_dict().items() if not n.startswith('norm')]
            # torch's files have checksums; in the others a flipped bit changes one value at most.
            assert sum(n_different) <= (0 if ending == '.pth' else 1), pos


@pytest.mark.parametrize('grn', [False, True])
def test_conversion_round_trip(tmp_path, grn):
    weights = original_weights(SMALL, grn)
    (tmp_path / 'in').mkdir()
    original = save_pth(tmp_path / 'in/original.pth', {'model': weights})
    files = {'original': original}
    for target in EXPORT_FORMATS:
        files[target] = tmp_path / f'{target}{".safetensors" if target == "safetensors" else ".pth"}'
        assert convert(original, files[target], target) == len(weights)
    for source, file in files.items():
        for target in EXPORT_FORMATS:
            converted, converted_back = tmp_path / f'{source}-{target}.pth', tmp_path / f'{source}-{target}-back.pth'
            convert(file, converted, target)
            convert(converted, converted_back, 'original')
            actual = torch.load(converted_back)['model']
            assert actual.keys() == weights.keys()
            assert all(torch.equal(actual[n], weights[n]) and actual[n].shape == weights[n].shape for n in weights)
    names = rename_to_library(weights, TIMM)
    assert torch.load(files['timm']).keys() == names.keys()
    names = {n.replace('convnext.', 'convnextv2.') if grn else n for n in rename_to_library(weights, TRANSFORMERS)}
    assert torch.load(files['transformers']).keys() == names
    assert load_file(files['safetensors']).keys() == weights.keys()


def test_shared_tensors_convert(tmp_path):
    weights = original_weights(SMALL)
    weights['stages.2.1.gamma'] = weights['stages.2.0.gamma']
    file = save_pth(tmp_path / 'w.pth', {'model': weights})
    convert(file, tmp_path / 'out.safetensors', 'safetensors')
    actual = load_file(tmp_path / 'out.safetensors')
    assert all(torch.equal(actual[n], t) for n, t in weights.items()) and actual.keys() == weights.keys()


def test_damaged_weights_do_not_convert(tmp_path):
    weights = original_weights(SMALL)
    weights['stages.2.1.gamma'][3] = float('nan')
    with pytest.raises(UsageError, match='stages.2.1.gamma contains NaN or Inf'):
        convert(save_pth(tmp_path / 'w.pth', {'model': weights}), tmp_path / 'out.pth', 'timm')
    assert not (tmp_path / 'out.pth').exists()


def test_shards_must_match_their_index(tmp_path):
    save_file({'a': torch.ones(2), 'b': torch.ones(2)}, tmp_path / 'one.safetensors')
    save_file({'a': torch.zeros(2), 'c': torch.ones(2)}, tmp_path / 'two.safetensors')
    index = tmp_path / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': dict.fromkeys('ab', 'one.safetensors') | {'c': 'two.safetensors'}}))
    with pytest.raises(UsageError, match=r'its shard two.safetensors do not contain the same tensors \(a\)'):
        load_checkpoint(index)


def test_lossy_conversion_is_refused(tmp_path):
    file = save_pth(tmp_path / 'w.pth', {'model': original_weights(SMALL)})
    with pytest.raises(UsageError, match='already exists'):
        convert(file, file, 'timm')
    with pytest.raises(UsageError, match='cannot be written'):
        convert(file, tmp_path / 'no/where.pth', 'timm')
    with_output_norms = save_pth(tmp_path / 'ours.pth', ConvNeXt(SMALL).state_dict())
    with pytest.raises(UsageError, match='norm0.weight, which timm has no name for'):
        convert(with_output_norms, tmp_path / 'out.pth', 'timm')
    detector = {f'backbone.{n}': t for n, t in original_weights(SMALL).items()} | {'neck.weight': torch.ones(1)}
    with pytest.raises(UsageError, match=r'more than a ConvNeXt \(1 tensors, such as neck.weight'):
        convert(save_pth(tmp_path / 'd.pth', detector), tmp_path / 'out.pth', 'timm')
    with_ema = {'model': original_weights(SMALL), 'model_ema': original_weights(SMALL)}
    with pytest.raises(UsageError, match="those of 'model_ema'"):
        convert(save_pth(tmp_path / 'b.pth', with_ema), tmp_path / 'out.pth', 'timm')
    assert not (tmp_path / 'out.pth').exists() and not list(tmp_path.glob('*.part'))


def test_naming_is_bijective():
    assert len({f.key for f in NAMING_SCHEMES}) == len(NAMING_SCHEMES)
    weights = original_weights(SMALL) | original_weights(SMALL, grn=True)
    for source in NAMING_SCHEMES:
        names = [source.to_source_name(n) for n in weights]
        assert len(set(names) - {None}) == len([n for n in names if n])


class Server(BaseHTTPRequestHandler):
    n_requests, content, content_length = 0, b'', None

    def do_GET(self):
        type(self).n_requests += 1
        self.send_response(200)
        self.send_header('Content-Length', str(self.content_length or len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    handler = type('Handler', (Server,), {})
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    handler.address = f'http://127.0.0.1:{server.server_port}'
    handler.content = save_pth(tmp_path / 'served.pth', {'model': original_weights(SMALL)}).read_bytes()
    yield handler
    server.shutdown()


def test_download(server):
    url = f'{server.address}/convnext.pth'
    load_backbone(ConvNeXt(SMALL), url)
    file = hub.download(url)
    assert file.read_bytes() == server.content and server.n_requests == 1
    assert {f.name for f in file.parent.iterdir()} == {file.name, f'.{file.name}.lock'}  # no partial file is left


def test_concurrent_downloads_wait(server):
    files = []
    threads = [threading.Thread(target=lambda: files.append(hub.download(f'{server.address}/w.pth'))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert server.n_requests == 1 and len(set(files)) == 1


def downloaded_files(tmp_path) -> list[Path]:
    return [path for path in (tmp_path / 'hub').rglob('*') if path.is_file() and path.suffix != '.lock']


@pytest.mark.parametrize('cut', [1, 100, 10_000])
@pytest.mark.parametrize('kind', ['zip', 'legacy', 'safetensors'])
def test_truncated_download_is_refused_and_removed(server, tmp_path, kind, cut):
    weights = original_weights(SMALL)
    if kind == 'safetensors':
        save_file(weights, tmp_path / 'served.pth')
    else:
        torch.save(weights, tmp_path / 'served.pth', _use_new_zipfile_serialization=kind == 'zip')
    content = (tmp_path / 'served.pth').read_bytes()
    server.content, server.content_length = content[:-cut], len(content)
    with pytest.raises(UsageError, match=rf'^{server.address}/w.pth cannot be read .* download .*again') as error:
        hub.download(f'{server.address}/w.pth')
    assert '\n' not in str(error.value) and downloaded_files(tmp_path) == []
    server.content = content
    assert hub.download(f'{server.address}/w.pth').read_bytes() == content


def test_downloaded_web_page_is_refused_and_removed(server, tmp_path):
    server.content = b'<!DOCTYPE html><html>Log in</html>'
    with pytest.raises(UsageError, match=f'^{server.address}/w.pth is a web page'):
        hub.download(f'{server.address}/w.pth')
    assert downloaded_files(tmp_path) == []


def test_download_with_wrong_hash_is_refused_and_removed(server, tmp_path):
    with pytest.raises(UsageError, match=rf'cannot download {server.address}/w-0badc0de.pth .*hash.* save it as'):
        hub.download(f'{server.address}/w-0badc0de.pth')
    assert downloaded_files(tmp_path) == []


def download(folder: Path, url: str, out: Path) -> None:
    torch.hub.set_dir(str(folder))
    out.write_text(str(hub.download(url)))


def test_processes_download_once(server, tmp_path, tool_context):
    outs = [tmp_path / f'{i}.txt' for i in range(3)]
    args = tmp_path / 'hub', f'{server.address}/w.pth'
    processes = [tool_context.Process(target=download, args=(*args, out)) for out in outs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert server.n_requests == 1 and len({out.read_text() for out in outs}) == 1
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_date_in_name_is_no_hash(server):
    assert hub.download(f'{server.address}/upernet-20240131.pth').exists()


def test_hash_in_name_is_checked(server):
    import hashlib

    digest = hashlib.sha256(server.content).hexdigest()[:8]
    assert hub.download(f'{server.address}/w-{digest}.pth').exists()


def test_gated_weights_are_not_downloaded():
    name = next(name for name in hub.WEIGHTS if name.startswith('dinov3'))
    with pytest.raises(UsageError, match='request it at https://ai.meta.com'):
        hub.download(name)


def test_command_line_tool(run_tool, tmp_path):
    weights = original_weights('atto', head=10)
    save_pth(tmp_path / 'w.pth', {'model': weights})
    process = run_tool('weights.py', 'inspect', 'w.pth', '--table')
    assert process.returncode == 0, process.stderr
    for words in (
        'ConvNeXt atto (depths (2, 2, 6, 2)',
        'the original code',
        '10 classes',
        '124 of 132 backbone tensors',
    ):
        assert words in process.stdout
    assert len(process.stdout.splitlines()) == 9 + 2 + len(weights)
    process = run_tool('weights.py', 'convert', 'w.pth', 'timm.safetensors', '--to', 'timm')
    assert process.stdout == f'timm.safetensors: {len(weights)} tensors in the names of timm\n'
    assert 'source      timm' in run_tool('weights.py', 'inspect', 'timm.safetensors').stdout
    one_line_error(run_tool('weights.py', 'convert', 'w.pth', 'w.pth', '--to', 'ours'), 'already exists')
    one_line_error(run_tool('weights.py', 'inspect', 'gone.pth'), 'gone.pth')
    process = run_tool('weights.py', 'list')
    assert process.returncode == 0 and len(process.stdout.splitlines()) == 1 + len(hub.WEIGHTS)
    assert {line.split()[0] for line in process.stdout.splitlines()[1:]} == set(hub.WEIGHTS)
