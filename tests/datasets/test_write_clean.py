"""`check_data.py --fix`: the data set that it writes has no problems and the same content."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from convnext_dense.datasets.custom import DatasetRequest, read_data
from convnext_dense.datasets.write_dataset import write_clean
from helpers.datasets import TRAIN, check_dataset, edit_coco, load_coco, run


def damage(content):
    """What is dropped: an image that is missing, a box without area; what is fixed: ids as text, areas."""
    content['images'].append(dict(id=999, file_name='gone.png', width=64, height=64))
    annotation_to_copy = content['annotations'][0]
    content['annotations'].append({**annotation_to_copy, 'id': 900, 'bbox': [1, 1, 0, 5]})
    for annotation in content['annotations']:
        annotation.pop('area')


def test_dropped_annotations_are_not_written(toy_dataset, tmp_path, capsys):
    root, out = tmp_path / 'set', tmp_path / 'clean'
    shutil.copytree(toy_dataset, root)
    edit_coco(damage)(root)
    name = load_coco(root, 'train')['images'][1]['file_name'].rsplit('/', 1)[-1]
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down, as training reads it
    stored = Image.open(root / 'train' / name)
    stored.save(root / 'train' / name, exif=exif)
    assert run('check_data.py', '--data', root, '--task', 'detection', '--fix', out) == 1  # there was something to fix
    assert f'{out}: train: ' in capsys.readouterr().out
    data, problems = check_dataset(out)
    assert not set(problems) & {'missing-image', 'box-without-area', 'missing-area', 'exif-rotated-image'}
    assert not data.report.problems and run('check_data.py', '--data', out, '--task', 'detection') == 0
    original, content = load_coco(toy_dataset, 'train'), load_coco(out, 'train')
    keys = ('bbox', 'segmentation', 'category_id', 'iscrowd')
    by_name = [
        sorted(json.dumps([names[a['image_id']], *(a[key] for key in keys)]) for a in coco['annotations'])
        for coco in (original, content)
        for names in [{image['id']: image['file_name'] for image in coco['images']}]
    ]
    assert by_name[0] == by_name[1] and {a['area'] > 0 for a in content['annotations']} == {True}
    for image in content['images']:
        path = out / 'train' / image['file_name']
        expected = np.asarray(Image.open(toy_dataset / 'train' / image['file_name']).convert('RGB'))
        expected = expected[::-1, ::-1] if image['file_name'] == name else expected
        assert np.array_equal(np.asarray(Image.open(path).convert('RGB')), expected) and not Image.open(path).getexif()
        if image['file_name'] != name:
            assert path.read_bytes() == (root / 'train' / image['file_name']).read_bytes()
    assert run('check_data.py', '--data', root, '--task', 'detection', '--fix', out) == 2
    assert "--fix '" in capsys.readouterr().err


@pytest.mark.parametrize('ignore', [None, [0]])
def test_masks_are_written_as_class_indices(toy_dataset, tmp_path, ignore):
    request = DatasetRequest(str(toy_dataset), ignore_labels=ignore)
    data = read_data(request, 'segmentation', ('train', 'val'))
    write_clean(data, str(tmp_path / 'clean'))
    clean_data, problems = check_dataset(tmp_path / 'clean', 'segmentation')
    assert clean_data.classes == data.classes and not problems and not any(clean_data.dataset_kwargs.values())
    for (original, mask), (image, written) in zip(data.splits['train'], clean_data.splits['train'], strict=True):
        labels = np.asarray(Image.open(toy_dataset / mask)).astype(int)
        expected = np.where(labels == 0, 255, labels - 1)  # the toy data set's classes begin at 1
        assert np.array_equal(np.asarray(Image.open(tmp_path / 'clean' / written)), expected)
        assert (tmp_path / 'clean' / image).read_bytes() == (toy_dataset / original).read_bytes()


def test_equal_image_names_in_two_folders_stay_separate(tmp_path):
    for folder in ('a', 'b'):
        (tmp_path / 'set' / folder).mkdir(parents=True)
        image = Image.fromarray(np.full((40, 40, 3), dict(a=99, b=200)[folder], np.uint8))
        image.save(tmp_path / 'set' / folder / '1.png')
    images = [dict(id=i, file_name=f'{folder}/1.png', width=40, height=40) for i, folder in enumerate('ab')]
    boxes = [dict(id=i, image_id=i, category_id=1, bbox=[i, 1, 30, 30], area=900, iscrowd=0) for i in range(2)]
    for file in (TRAIN, 'annotations/instances_val.json'):
        (tmp_path / 'set' / file).parent.mkdir(exist_ok=True)
        content = dict(images=images, annotations=boxes, categories=[dict(id=1, name='x')])
        (tmp_path / 'set' / file).write_text(json.dumps(content))
    write_clean(check_dataset(tmp_path / 'set')[0], str(tmp_path / 'clean'))
    content = load_coco(tmp_path / 'clean', 'train')
    files = {image['id']: tmp_path / 'clean/train' / image['file_name'] for image in content['images']}
    assert {i: np.asarray(Image.open(file))[0, 0, 0] for i, file in files.items()} == {0: 99, 1: 200}
