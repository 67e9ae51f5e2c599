"""A data.yaml that says where everything is: the same data set as by flags, and each mistake in it is one line."""

import argparse
import os
import shutil

import pytest

from convnext_dense.datasets.custom import (
    add_data_arguments,
    apply_custom_data,
    detect_tasks,
    parse_request,
    read_data,
)
from convnext_dense.datasets.toy_shapes import LABEL_NAMES
from helpers.box_formats import as_supervisely, as_via_1
from helpers.datasets import load_recipe, write_masks
from helpers.files import error_message

BOXES = """\
path: {root}
train:
  images: train
  annotations: annotations/instances_train.json
val:
  images: val
  annotations: annotations/instances_val.json
"""
YOLO = 'path: {root}\ntrain: images/train\nval: images/val\nnames: [a, b]\n'


def request_of(*arguments):
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    return parse_request(parser.parse_args([*map(str, arguments)]))


def read(request, task='detection'):
    data = read_data(request, task, ('train', 'val'))
    return data, {finding.code: finding for finding in data.report.diagnostics.values()}


def write(folder, text, name='data.yaml'):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def test_yaml_equals_flags(toy_dataset, tmp_path):
    file = write(tmp_path, BOXES.format(root=toy_dataset) + 'classes: [cross, disc=round]\n')
    flags = [f'--{s}-ann={toy_dataset}/annotations/instances_{s}.json' for s in ('train', 'val')]
    flags += [f'--{s}-images={toy_dataset}/{s}' for s in ('train', 'val')]
    data, findings = read(request_of('--data', file))
    expected = read(request_of(*flags, '--classes', 'cross', 'disc=round'))[0]
    names = [[os.path.join(d.root, i['file_name']) for i in d.splits['train']['images']] for d in (data, expected)]
    assert names[0] == names[1] and data.classes == ['cross', 'round'] == expected.classes
    assert data.splits['val']['annotations'] == expected.splits['val']['annotations']
    assert 'layout of data.yaml' in data.report.facts[0] and 'images-outside-folder' not in findings
    assert read(request_of('--data', tmp_path))[0].classes == data.classes  # the folder that holds it
    assert read(request_of('--data', file, '--classes', 'disc'))[0].classes == ['disc']


def test_paths_outside_its_folder_are_used_and_reported_once(toy_dataset, tmp_path):
    text = BOXES.format(root='.').replace(' annotations/', f' {toy_dataset}/annotations/')
    for split in ('train', 'val'):
        text = text.replace(f'images: {split}\n', f'images: {os.path.relpath(toy_dataset, tmp_path)}/{split}\n')
    data, findings = read(request_of('--data', write(tmp_path, text)))
    assert len(data.splits['train']['images']) == 5
    assert findings['images-outside-folder'].count == 4
    assert [f.code for f in data.report.by_action()].count('images-outside-folder') == 1


def test_masks_and_folders_of_labels(toy_dataset, tmp_path):
    for split in ('train', 'val'):
        write_masks(toy_dataset, split, tmp_path / 'm' / split)
    text = f'train: {{images: {toy_dataset}/train, masks: m/train}}\nval: {{images: {toy_dataset}/val, masks: m/val}}\n'
    (tmp_path / 'names.txt').write_text('\n'.join(LABEL_NAMES))
    options = 'channels: [3, 1]\nmask-threshold: 9\nignore-other-colors: true\n'
    request = request_of('--data', write(tmp_path, text + options))
    assert (request.channels, request.mask_threshold, request.ignore_other_colors) == ((3, 1), 9, True)
    for word in ('false', 'no'):
        file = write(tmp_path, text + f'ignore-other-colors: {word}\n')
        assert request_of('--data', file).ignore_other_colors is False
    file = write(tmp_path, text + 'classes: names.txt\n')
    assert detect_tasks(request_of('--data', file)) == ['segmentation']
    names = read(request_of('--data', file), 'segmentation')[0].classes
    assert names == list(LABEL_NAMES)
    file = write(tmp_path, text + f'classes: {["a", "b", "c", "d", "e"]}\n')
    assert read(request_of('--data', file), 'segmentation')[0].classes == ['a', 'b', 'c', 'd', 'e']
    data = read(request_of('--data', file), 'segmentation')[0]
    assert {split: len(pairs) for split, pairs in data.splits.items()} == {'train': 5, 'val': 3}
    as_supervisely(toy_dataset, tmp_path / 's')
    file = write(tmp_path / 's', 'train: {annotations: train/ann, images: train/img}\nval-fraction: 0.4\n')
    data = read(request_of('--data', file))[0]
    assert len(data.splits['val']['images']) == 2 and ': Supervisely, layout of data.yaml' in data.report.facts[0]
    as_via_1(toy_dataset, tmp_path / 'v')
    text = 'train: {annotations: train/via_region_data.json}\nformat: via\nclass-attribute: name\n'
    file = write(tmp_path / 'v', text)
    assert ': VIA, layout' in read(request_of('--data', file))[0].report.facts[0]


def test_yolo_labels_in_another_folder(tmp_path, toy_dataset):
    for split in ('train', 'val'):
        shutil.copytree(toy_dataset / split, tmp_path / 'photos' / split)
        for path in (tmp_path / 'photos' / split).iterdir():
            label = tmp_path / 'txt' / split / f'{path.stem}.txt'
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text('1 0.5 0.5 0.25 0.5\n')
    (tmp_path / 'txt/train/classes.txt').write_text('cat\ndog\n')
    text = 'train: {annotations: txt/train, images: photos/train}\nval: {annotations: txt/val, images: photos/val}\n'
    data, findings = read(request_of('--data', write(tmp_path, text)))
    assert data.classes == ['cat', 'dog'] and not {f.code for f in findings.values() if f.action == 'dropped'}
    boxes = [a['bbox'] for split in data.splits.values() for a in split['annotations']]
    assert boxes == [[24, 16, 16, 32]] * 8


def test_yolo_yaml_is_read_by_the_yolo_reader(tmp_path):
    file = write(tmp_path, YOLO.format(root=tmp_path))
    request = request_of('--data', file)
    assert request.data_yaml is None and 'its train is images/train, which is not there' in error_message(read, request)


MISTAKES = {  # the text, or what is replaced in that of boxes -> the message
    'names': (('val:', 'names: [a]\nval:'), 'names is of a data.yaml of YOLO, whose train and val are paths'),
    'a path and a mapping': (('val:\n  images: val\n  annotations: annotations/instances_val.json', 'val: val'),
                             'val has to be a mapping of images and annotations (or masks)'),
    'an unknown key': (('path:', 'class: [a]\npath:'), "unknown key 'class': did you mean classes?"),
    'an unknown key of a split': (('  images: train', '  image: train'), "unknown key 'image': did you mean images?"),
    'no annotations': (('  annotations: annotations/instances_train.json\n', ''), 'train needs annotations'),
    'missing images': (('images: train', 'images: gone'), "gone' is no folder"),
    'missing annotations': (('instances_val', 'gone'), "gone.json' does not exist"),
    'a list': (('images: train', 'images: [a, b]'), 'images has to be a path'),
    'masks without images': (('  images: val\n  annotations: annotations/instances_val.json', '  masks: val'),
                             'val needs images'),
    'both tasks': (('annotations: annotations/instances_val.json', 'masks: val'), 'are for different tasks'),
    'words': (('path:', 'ignore: [a]\npath:'), 'ignore is a list of integers'),
    'nested classes': (('path:', 'classes: [[disc, cross]]\npath:'), 'classes has to be a list of names'),
    'numbered classes': (('path:', 'classes: {0: disc}\npath:'), 'classes has to be a list of names'),
    'no format': (('path:', 'format: [via]\npath:'), 'is unknown: give one of coco, yolo'),
    'no switch': (('path:', 'ignore-other-colors: 1\npath:'), 'ignore_other_colors has to be true or false'),
    'channels': (('path:', 'channels: [1, 1]\npath:'), 'a channel is named twice'),
    'no classes': (('path:', 'classes: []\npath:'), 'classes has to be a list of names'),
    'a blank': (('path:', 'classes:\npath:'), 'classes has to be a list of names'),
    'a key twice': (('val:', 'train:'), "line 5: the key 'train' is given in line 2 already"),
    'a key of a split twice': (('  images: val', '  images: val\n  images: train'), "line 7: the key 'images' is"),
    'no YAML': (('path:', '"'), 'is not valid YAML'),
}  # fmt: skip


@pytest.mark.parametrize('kind', MISTAKES)
def test_mistakes_are_one_line_errors(kind, toy_dataset, tmp_path):
    (old, new), message = MISTAKES[kind]
    text = BOXES.format(root=toy_dataset)
    assert old in text
    line = error_message(request_of, '--data', write(tmp_path, text.replace(old, new)))
    assert message in line and 'data.yaml' in line


def test_path_flags_contradict_the_yaml(toy_dataset, tmp_path):
    file = write(tmp_path, BOXES.format(root=toy_dataset))
    line = error_message(request_of, '--data', file, '--train-ann', toy_dataset / 'annotations/instances_train.json')
    assert 'data.yaml says where everything is: leave out --train-ann' in line


def test_changed_yaml_is_read_again(toy_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, BOXES.format(root=toy_dataset))

    def classes():
        config = load_recipe('demo/mask_rcnn')
        config.work_dir = str(tmp_path / 'run')
        apply_custom_data(config, request_of('--data', file))
        return config.train_dataloader.dataset.metainfo.classes

    assert len(classes()) == 4
    manifest = tmp_path / 'run/data/data.json'
    mtime = manifest.stat().st_mtime_ns
    assert len(classes()) == 4 and manifest.stat().st_mtime_ns == mtime
    write(tmp_path, BOXES.format(root=toy_dataset) + 'classes: [disc]\n')
    assert classes() == ('disc',)
