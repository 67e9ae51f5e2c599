"""Metadata of exported files without a runtime; files that are cut off, no models, or could run code."""

import contextlib
import json
import shutil
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from convnext_dense.checkpoints import exported_files
from convnext_dense.checkpoints.exported_files import is_exported, read_exported
from convnext_dense.checkpoints.exported_meta import KEY
from convnext_dense.checkpoints.pt2_check import check_pt2
from convnext_dense.errors import UsageError
from helpers.exported import meta_of, save_detector, save_openvino, save_program, save_segmentor

onnx = pytest.importorskip('onnx')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A model in each format."""
    folder = tmp_path_factory.mktemp('exported')
    detector = save_detector(folder / 'a.onnx')
    paths = {'.onnx': detector, '.pt2': save_program(folder / 'a.pt2')}
    with contextlib.suppress(ImportError):
        paths['.xml'] = save_openvino(folder / 'a.xml', detector)
    return paths


def test_suffixes():
    assert all(map(is_exported, ['a.onnx', 'b/A.ONNX', 'a.xml', 'a.pt2']))
    assert not any(map(is_exported, ['a.pth', 'a.pt', 'onnx', 'convnext_tiny_1k_224', 'http://a/b.pth']))


@pytest.mark.parametrize('suffix', ['.onnx', '.xml', '.pt2'])
def test_metadata_and_outputs(suffix, files):
    if suffix not in files:
        pytest.skip('no OpenVINO')
    file = read_exported(files[suffix])
    assert file.meta == (meta_of('upernet') if suffix == '.pt2' else meta_of('mask_rcnn'))
    expected = None if suffix == '.pt2' else ('boxes', 'scores', 'labels', 'masks')
    assert file.outputs == expected


def test_graphs_are_not_read(tmp_path, monkeypatch):
    """Of a model with weights of 50 MB, a few kilobytes."""
    path = save_segmentor(tmp_path / 'a.onnx')
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(12_500_000, np.float32), 'weights'))
    onnx.save(model, path)
    sizes, read = [], exported_files._read_text
    monkeypatch.setattr(exported_files, '_read_text', lambda f, a, b: sizes.append(b - a) or read(f, a, b))
    tracemalloc.start()
    assert read_exported(path).outputs == ('segmentation',)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000 and 1000 < sum(sizes) < 100_000
    tracemalloc.stop()


def refusal(path):
    with pytest.raises(UsageError) as error:
        file = read_exported(path)
        if path.suffix == '.pt2':
            check_pt2(file.path)
    assert '\n' not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('suffix', ['.onnx', '.xml', '.pt2'])
def test_files_that_are_cut_off_or_no_models(suffix, files, tmp_path):
    path = tmp_path / f'a{suffix}'
    path.write_bytes(b'')
    assert 'is empty' in refusal(path)
    for content in (
        b'no model',
        b'\x08',
        bytes(range(256)),
        b'<html></html>',
        b'PK\x03\x04',
        '<?xml encoding="ü"?>'.encode(),
    ):
        path.write_bytes(content)
        refusal(path)
    if suffix not in files:
        pytest.skip('no OpenVINO')
    content = files[suffix].read_bytes().rstrip()
    for length in [*range(1, len(content), max(len(content) // 50, 1)), len(content) - 1]:
        path.write_bytes(content[:length])
        message = refusal(path)
        assert 'cut off' in message or suffix == '.pt2'  # of which a member is an archive too
    path.unlink()
    assert 'not a regular file' in refusal(path)


def test_models_of_others(files, tmp_path):
    path = tmp_path / 'a.onnx'
    model = onnx.load(files['.onnx'])
    del model.metadata_props[:]
    onnx.save(model, path)
    assert 'is not a model that tools/export.py wrote: its metadata have no convnext_dense' in refusal(path)
    onnx.helper.set_model_props(model, {KEY: json.dumps({'format': 3})})
    onnx.save(model, path)
    assert 'have the format 3, this version reads 1' in refusal(path)


def test_openvino_needs_its_weights(files, tmp_path):
    if '.xml' not in files:
        pytest.skip('no OpenVINO')
    shutil.copy(files['.xml'], tmp_path / 'b.xml')
    assert 'needs its weights, b.bin, next to it: copy both files' in refusal(tmp_path / 'b.xml')


def changed(archive, target, name, change):
    """Copy an archive, with one member changed."""
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, 'w') as new:
        for member in old.namelist():
            content = old.read(member)
            new.writestr(member, change(content) if member.endswith(name) else content)
    return target


def with_program(change):
    def apply(content):
        program = json.loads(content)
        change(program)
        return json.dumps(program).encode()

    return apply


def evil(text):
    return text.replace('X', "__import__('os').system('echo')")


DANGERS = {
    'a call of a function': lambda p: p['graph_module']['graph']['nodes'][0].update(target='torch.os.system'),
    'a call of a method': lambda p: p['graph_module']['graph']['nodes'][0].update(target='_operator.attrgetter'),
    'an expression': lambda p: p.update(x=[{'as_expr': {'expr_str': evil('X')}}]),
    'an expression of known names': lambda p: p.update(x=[{'as_expr': {'expr_str': 'Max(open(1), 2)'}}]),
    'an attribute': lambda p: p.update(x=[{'as_expr': {'expr_str': 'Max.mro'}}]),
    'a guard': lambda p: p.update(guards_code=[evil("L['images'].size()[0] == X")]),
    'a guard of two lines': lambda p: p.update(guards_code=['1 == 1", "")\n  import os #']),
    'a spec': lambda p: p['graph_module']['module_call_graph'][0]['signature'].update(in_spec=evil('X')),
    'a pickle': lambda p: p.update(x={'use_pickle': True}),
}


@pytest.mark.parametrize('case', DANGERS)
def test_programs_that_could_run_code_are_refused(case, files, tmp_path):
    check_pt2(str(files['.pt2']))
    path = changed(files['.pt2'], tmp_path / 'a.pt2', 'models/model.json', with_program(DANGERS[case]))
    assert 'is not loaded, since it could run code' in refusal(path)


def test_example_inputs_that_are_a_pickle_are_refused(files, tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ('executed',)

    torch.save(Evil(), tmp_path / 'evil')
    evil = (tmp_path / 'evil').read_bytes()
    path = changed(files['.pt2'], tmp_path / 'a.pt2', 'sample_inputs/model.pt', lambda content: evil)
    assert 'model.pt is a pickle' in refusal(path)


@pytest.mark.parametrize('member', ['data/aotinductor/model/a.so', 'data/constants/custom_obj_0', 'x.py'])
def test_libraries_and_objects_are_refused(member, files, tmp_path):
    shutil.copy(files['.pt2'], tmp_path / 'a.pt2')
    with zipfile.ZipFile(tmp_path / 'a.pt2', 'a') as archive:
        archive.writestr(f'a/{member}', b'')
    assert f'it contains {member}' in refusal(tmp_path / 'a.pt2')
