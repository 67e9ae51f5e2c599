"""Custom data sets in the supported layouts, and their checks."""

import json
import re
import runpy
import shutil
import sys

import cv2
import numpy as np
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as coco_mask

from convnext_dense.datasets import toy_shapes
from convnext_dense.datasets.custom import DatasetRequest, read_data
from helpers.paths import ROOT

TRAIN, VAL = 'annotations/instances_train.json', 'annotations/instances_val.json'


def edit_coco(change, file=TRAIN):
    """Return a function that changes the content of a COCO file below a root."""

    def damage(root):
        content = json.loads((root / file).read_text())
        change(content)
        (root / file).write_text(json.dumps(content))

    return damage


def check_dataset(root, task='detection', **request):
    data = read_data(DatasetRequest(str(root), **request), task, ('train', 'val'))
    return data, {finding.code: finding for finding in data.report.diagnostics.values()}


CONFIGS = ROOT / 'configs'
DETECTOR, SEGMENTOR = CONFIGS / 'demo/mask_rcnn.py', CONFIGS / 'demo/upernet.py'
N_TRAIN, N_VAL = 5, 3


def load_coco(toy_dataset, split):
    return json.loads((toy_dataset / f'annotations/instances_{split}.json').read_text())


def copy_images(toy_dataset, split, folder, name='{}', suffix='.png'):
    """Copy the images of a split into a folder, under other names and in another format."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((toy_dataset / split).iterdir()):
        new = folder / (name.format(path.stem) + suffix)
        if suffix == '.png':
            shutil.copy(path, new)
        else:
            cv2.imwrite(str(new), cv2.imread(str(path)))


def write_json(content, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def renumber_categories(content):
    """Return a COCO dict with other category ids, in another order."""
    ids = {c['id']: 7 * (10 - c['id']) for c in content['categories']}
    return {
        **content,
        'categories': [{**c, 'id': ids[c['id']]} for c in content['categories']][::-1],
        'annotations': [{**a, 'category_id': ids[a['category_id']]} for a in content['annotations']],
    }


def as_roboflow(toy_dataset, folder):
    for split, name in (('train', 'train'), ('val', 'valid')):
        content = load_coco(toy_dataset, split)
        content['categories'] = [dict(id=0, name='shapes', supercategory='none')] + [
            {**c, 'supercategory': 'shapes'} for c in content['categories']
        ]
        copy_images(toy_dataset, split, folder / name)
        write_json(content, folder / name / '_annotations.coco.json')


def class_map(toy_dataset, split, path):
    """Return the segmentation mask of an image: ground is 0, ..., borders are 255."""
    labels = cv2.imread(str(toy_dataset / 'labels' / split / path), cv2.IMREAD_UNCHANGED)
    return np.where(labels == 0, 255, labels.astype(int) - 1).astype(np.uint8)


def write_masks(toy_dataset, split, folder, change=lambda classes: classes, name='{}', palette=False):
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((toy_dataset / split).iterdir()):
        image = Image.fromarray(change(class_map(toy_dataset, split, path.name)).astype(np.uint8))
        if palette:
            image.putpalette([i % 256 for i in range(768)])
        image.save(folder / f'{name.format(path.stem)}.png')


def as_voc(toy_dataset, folder):
    folder = folder / 'VOC2012'
    (folder / 'ImageSets/Segmentation').mkdir(parents=True)
    for split in ('train', 'val'):
        copy_images(toy_dataset, split, folder / 'JPEGImages', split + '_{}', '.jpg')
        write_masks(toy_dataset, split, folder / 'SegmentationClass', name=split + '_{}', palette=True)
        names = [f'{split}_{path.stem}' for path in sorted((toy_dataset / split).iterdir())]
        (folder / f'ImageSets/Segmentation/{split}.txt').write_text('\n'.join(names))
    copy_images(toy_dataset, 'val', folder / 'JPEGImages', 'no_segmentation_{}', '.jpg')
    return ['--data', folder]


def as_folders(toy_dataset, folder):
    """images/ and masks/, with images of all suffixes and a classes file."""
    for split in ('train', 'val'):
        copy_images(toy_dataset, split, folder / 'images' / split, suffix='.jpg')
        for i, suffix in enumerate(('.JPG', '.jpeg', '.png')):
            path = sorted((folder / 'images' / split).glob('*.jpg'))[0]
            if i == 2:
                cv2.imwrite(str(path.with_suffix('.png')), cv2.imread(str(path)))
                path.unlink()
            else:
                path.rename(path.with_suffix(suffix))
        write_masks(toy_dataset, split, folder / 'masks' / split)
    (folder / 'classes.txt').write_text('\n'.join(toy_shapes.LABEL_NAMES))


def run(tool, *args):
    """Run a tool in this process; return the exit code."""
    argv = sys.argv
    sys.argv = [tool, *map(str, args)]
    try:
        runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = argv
    return 0


def predictions_as_labels(predictions, path):
    """A labeled split of some of the predictions themselves, slightly shifted: random weights detect no shapes."""
    annotations = []
    rng = np.random.RandomState(0)
    for annotation in predictions['annotations'][::7]:
        x, y, w, h = annotation['bbox']
        shift = rng.randint(0, 3)
        mask = np.roll(coco_mask.decode(annotation['segmentation']), shift, 1)
        if mask.sum() < 4:
            continue
        rle = coco_mask.encode(np.asfortranarray(mask))
        annotations.append(
            {
                **{key: annotation[key] for key in ('image_id', 'category_id', 'iscrowd')},
                'id': len(annotations) + 1,
                'bbox': [x + shift, y, w, h],
                'area': float(mask.sum()),
                'segmentation': {**rle, 'counts': rle['counts'].decode()},
            }
        )
    content = {key: predictions[key] for key in ('images', 'categories')}
    path.write_text(json.dumps({**content, 'annotations': annotations}))


def quick_options(name):
    """Return --cfg-options for a training of a second."""
    return [
        *(f'{s}_dataloader.num_workers=0' for s in ('train', 'val', 'test')),
        *(f'{s}_dataloader.persistent_workers=False' for s in ('train', 'val', 'test')),
        'train_dataloader.batch_size=3', 'log_level=WARNING', f'experiment_name={re.sub("[^a-z]", "", name.lower())}',
    ]  # fmt: skip


def load_recipe(name):
    """Load a recipe as the tools do."""
    config = Config.fromfile(CONFIGS / f'{name}.py')
    config.launcher, config.work_dir = 'none', 'run'
    return config


def write_dataset(folder, n, sizes=((64, 48), (48, 64), (64, 64)), masks=True):
    """Write a data set of `n` classes with one object each, as COCO json and masks; return the class names."""
    rng = np.random.RandomState(0)
    names = [f'thing {i}' for i in range(n)]
    for split in ('train', 'val'):
        images, annotations = [], []
        (folder / 'images' / split).mkdir(parents=True)
        (folder / 'masks' / split).mkdir(parents=True)
        for i, (width, height) in enumerate(sizes):
            image, labels = rng.randint(0, 256, (height, width, 3)), np.zeros((height, width), np.uint8)
            images.append(dict(id=i, file_name=f'{i}.png', width=width, height=height))
            for label in range(i, n, len(sizes)):
                x, y = rng.randint(0, width - 20), rng.randint(0, height - 20)
                labels[y : y + 20, x : x + 20] = label
                polygon = [x, y, x + 20, y, x + 20, y + 20, x, y + 20]
                annotation = dict(id=len(annotations), image_id=i, category_id=label + 1, bbox=[x, y, 20, 20], area=400)
                annotation |= dict(iscrowd=0, segmentation=[[float(v) for v in polygon]] if masks else [])
                annotations.append(json.loads(json.dumps(annotation, default=int)))
            cv2.imwrite(str(folder / 'images' / split / f'{i}.png'), image)
            Image.fromarray(labels).save(folder / 'masks' / split / f'{i}.png')
        categories = [dict(id=i + 1, name=name) for i, name in enumerate(names)]
        write_json(
            dict(images=images, annotations=annotations, categories=categories), folder / f'annotations/{split}.json'
        )
    (folder / 'classes.txt').write_text('\n'.join(names))
    return names
