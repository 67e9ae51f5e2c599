"""The metadata of exported models: a round trip, and one-line errors for invalid metadata."""

import dataclasses
import json

import pytest

from convnext_dense.checkpoints.exported_meta import CHECKS, ExportedMeta
from convnext_dense.errors import UsageError

META = ExportedMeta(
    task='detection',
    classes=('disc', 'größe'),
    config="model = dict(type='MaskRCNN')\n",
    palette=((220, 60, 50), (0, 0, 255)),
    input='float32',
    size=(96, 128),
    masks='box',
    mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375),
    recipe='mask_rcnn/convnext_t',
    versions={'torch': '2.13.0'},
    channels=3,
)


def test_round_trip():
    text = META.to_json()
    assert ExportedMeta.from_json(text, 'a.onnx') == META
    minimal = ExportedMeta('segmentation', ('a',), 'model = dict()')
    assert ExportedMeta.from_json(minimal.to_json(), 'a.onnx') == minimal
    names = 'format task classes palette config input size masks mean std recipe versions channels'  # a public format
    assert json.loads(text) == json.loads(json.dumps({'format': 1, **dataclasses.asdict(META)}))
    assert set(json.loads(text)) == set(names.split())


INVALID_TEXTS = {
    'no key': (None, 'is not a model that tools/export.py wrote: its metadata have no convnext_dense'),
    'empty': ('', 'is not a model that tools/export.py wrote'),
    'not JSON': ('{format: 1}', "the metadata 'convnext_dense' are not valid JSON"),
    'nested too deeply': ('[' * 100_000, 'are not valid JSON'),
    'a list': ('[1]', 'have the format None, this version reads 1'),
    'no format': ('{}', 'have the format None, this version reads 1'),
    'another format': (json.dumps({'format': 2}), 'have the format 2, this version reads 1: export the model again'),
}


@pytest.mark.parametrize('case', INVALID_TEXTS)
def test_invalid_metadata_is_refused_in_one_line(case):
    text, message = INVALID_TEXTS[case]
    with pytest.raises(UsageError) as error:
        ExportedMeta.from_json(text, 'a.onnx')
    assert str(error.value).startswith('a.onnx') and message in str(error.value) and '\n' not in str(error.value)


INVALID_VALUES = {
    'task': ['pose', None, ['detection'], {}],
    'classes': [None, 'disc', [1], {'0': 'disc'}],
    'config': [None, ['model'], 5],
    'palette': [None, [[1, 2]], [[1, 2, 256]], [[1, 2, 0.5]], [[1, 2, True]]],
    'input': [None, 'int8', ['raw']],
    'size': [[96], [0, 96], [96, 96.0], 'x', [96, 10**9]],
    'masks': ['rle', ['box']],
    'mean': [None, ['1'], 5],
    'std': [None, [True]],
    'recipe': [5],
    'versions': [None, ['torch'], {'torch': 2}],
    'channels': [0, '3', 3.5, True],
}


@pytest.mark.parametrize('name', INVALID_VALUES)
def test_values_of_a_wrong_type_are_refused(name):
    for value in INVALID_VALUES[name]:
        text = json.dumps({**json.loads(META.to_json()), name: value})
        with pytest.raises(UsageError, match=f"a.onnx: '{name}' in its metadata cannot be .*: export the model again"):
            ExportedMeta.from_json(text, 'a.onnx')


def test_every_attribute_is_checked():
    assert set(CHECKS) == {f.name for f in dataclasses.fields(ExportedMeta)} == set(INVALID_VALUES)
