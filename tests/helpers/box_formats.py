"""The toy data set in the formats of other programs, written by other ways than those in which they are read."""

import base64
import csv
import json
import zlib
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from helpers.datasets import copy_images, load_coco, write_json


def objects_of(toy_dataset, split):
    """Return (name, objects) of each image; an object is (class, polygon of shape (N, 2))."""
    coco = load_coco(toy_dataset, split)
    names = {c['id']: c['name'] for c in coco['categories']}
    for image in coco['images']:
        own = (a for a in coco['annotations'] if a['image_id'] == image['id'])
        yield image['file_name'], [(names[a['category_id']], np.reshape(a['segmentation'][0], (-1, 2))) for a in own]


def box_of(polygon):
    """Return x, y, width, height."""
    (x1, y1), (x2, y2) = polygon.min(0), polygon.max(0)
    return [float(v) for v in (x1, y1, x2 - x1, y2 - y1)]


def ls_value(name, polygon, size=(64, 64)):
    return dict(points=(polygon / size * 100).tolist(), polygonlabels=[name], closed=True)


def ls_result(value, kind, size=(64, 64), **more):
    common = dict(original_width=size[0], original_height=size[1], image_rotation=0, from_name='label', to_name='image')
    return common | dict(value=value, type=kind, origin='manual') | more


def ls_task(image, results, **more):
    annotation = dict(id=1, was_cancelled=False, ground_truth=False, result=results, created_at='2024-01-01T10:00:00Z')
    return dict(id=1, data=dict(image=image), annotations=[annotation], predictions=[]) | more


def as_label_studio(toy_dataset, root):
    """One export, of images that were uploaded, beside the folder of the originals."""
    tasks = []
    copy_images(toy_dataset, 'train', root / 'photos')
    for number, (name, objects) in enumerate(objects_of(toy_dataset, 'train')):
        results = [ls_result(ls_value(*each), 'polygonlabels', id=f'r{i}') for i, each in enumerate(objects)]
        tasks.append(ls_task(f'/data/upload/3/{number:08x}-{name}', results))
    write_json(tasks, root / 'project-3-at-2024-05-01-10-00-abc.json')


def as_label_studio_min(toy_dataset, root):
    """JSON_MIN, of local files."""
    tasks = []
    copy_images(toy_dataset, 'train', root / 'shots/a')
    for name, objects in objects_of(toy_dataset, 'train'):
        labels = [dict(ls_value(*each), original_width=64, original_height=64) for each in objects]
        tasks.append(dict(image=f'/data/local-files/?d=shots/a/{name}', id=1, label=labels, annotator=1))
    write_json(tasks, root / 'export.json')


def via_region(name, polygon, key='name'):
    x, y = polygon.T.tolist()
    shape = dict(name='polygon', all_points_x=x, all_points_y=y)
    return dict(shape_attributes=shape, region_attributes={key: name})


def as_via_1(toy_dataset, root):
    """As matterport's balloons: regions are a dict."""
    for split in ('train', 'val'):
        copy_images(toy_dataset, split, root / split)
        entries = {}
        for name, objects in objects_of(toy_dataset, split):
            regions = {str(i): via_region(*each) for i, each in enumerate(objects)}
            entries[f'{name}1234'] = dict(fileref='', size=1234, filename=name, base64_img_data='', regions=regions)
        write_json(entries, root / split / 'via_region_data.json')


def as_via_2(toy_dataset, root):
    """A project, whose regions are a list."""
    copy_images(toy_dataset, 'train', root / 'images')
    entries = {}
    for name, objects in objects_of(toy_dataset, 'train'):
        regions = [via_region(*each, key='kind') for each in objects]
        entries[f'{name}-1'] = dict(filename=name, size=-1, regions=regions, file_attributes=dict(caption='x'))
    settings = dict(ui={}, core=dict(filepath={}), project=dict(name='p'))
    attributes = dict(region=dict(kind=dict(type='dropdown', options={})), file={})
    project = dict(_via_settings=settings, _via_img_metadata=entries, _via_attributes=attributes)
    write_json(project, root / 'via_project_1.json')


def as_createml(toy_dataset, root):
    """Roboflow's export."""
    for split, folder in (('train', 'train'), ('val', 'valid')):
        copy_images(toy_dataset, split, root / folder)
        entries = []
        for name, objects in objects_of(toy_dataset, split):
            boxes = [(label, box_of(polygon)) for label, polygon in objects]
            annotations = [
                dict(label=label, coordinates=dict(x=x + w / 2, y=y + h / 2, width=w, height=h))
                for label, (x, y, w, h) in boxes
            ]
            entries.append(dict(image=name, annotations=annotations))
        write_json(entries, root / folder / '_annotations.createml.json')


def as_image_folder(toy_dataset, root):
    for split, folder in (('train', 'train'), ('val', 'validation')):
        copy_images(toy_dataset, split, root / folder)
        lines = []
        for name, objects in objects_of(toy_dataset, split):
            boxes, labels = [box_of(polygon) for _, polygon in objects], [label for label, _ in objects]
            lines.append(json.dumps(dict(file_name=name, objects=dict(bbox=boxes, categories=labels))))
        (root / folder / 'metadata.jsonl').write_text('\n'.join(lines) + '\n')


def as_image_folder_csv(toy_dataset, root):
    """A table at the top, with paths below it, whose objects are JSON."""
    copy_images(toy_dataset, 'train', root / 'photos')
    with open(root / 'metadata.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['file_name', 'objects'])
        for name, objects in objects_of(toy_dataset, 'train'):
            items = [dict(bbox=box_of(polygon), category=label) for label, polygon in objects]
            writer.writerow([f'photos/{name}', json.dumps(items)])


def as_supervisely(toy_dataset, root):
    names = set()
    for split in ('train', 'val'):
        copy_images(toy_dataset, split, root / split / 'img')
        for name, objects in objects_of(toy_dataset, split):
            names |= {label for label, _ in objects}
            figures = [
                dict(classTitle=label, geometryType='polygon', points=dict(exterior=polygon.tolist(), interior=[]))
                for label, polygon in objects
            ]
            content = dict(description='', tags=[], size=dict(height=64, width=64), objects=figures)
            write_json(content, root / split / 'ann' / f'{name}.json')
    classes = [dict(title=name, shape='polygon', color='#FF0000') for name in sorted(names)]
    write_json(dict(classes=classes, tags=[]), root / 'meta.json')


def as_panoptic(toy_dataset, root):
    """As COCO's: PNGs of ids in folders with the names of the JSON; the ground is stuff."""
    for split in ('train', 'val'):
        coco = load_coco(toy_dataset, split)
        copy_images(toy_dataset, split, root / f'{split}2017')
        pngs = root / f'annotations/panoptic_{split}2017'
        pngs.mkdir(parents=True)
        annotations = []
        for image in coco['images']:
            ids, infos = np.full((64, 64), 70_000), [dict(id=70_000, category_id=99, iscrowd=0)]
            for number, a in enumerate(a for a in coco['annotations'] if a['image_id'] == image['id']):
                segment = 300 * (number + 1)
                ids[decode(a['segmentation'][:1])] = segment
                infos.append(dict(id=segment, category_id=a['category_id'], iscrowd=0, bbox=[0, 0, 1, 1], area=1))
            rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
            cv2.imwrite(str(pngs / f'{Path(image["file_name"]).stem}.png'), rgb[..., ::-1])
            name = f'{Path(image["file_name"]).stem}.png'
            annotations.append(dict(image_id=image['id'], file_name=name, segments_info=infos))
        things = [c | dict(isthing=1, color=[1, 2, 3]) for c in coco['categories']]
        categories = [*things, dict(id=99, name='ground', isthing=0, color=[0, 0, 0])]
        content = dict(info={}, images=coco['images'], annotations=annotations, categories=categories)
        write_json(content, root / f'annotations/panoptic_{split}2017.json')


def decode(polygons, size=(64, 64)):
    """Return the pixels of polygons."""
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *size[::-1]))).astype(bool)


def supervisely_bitmap(pixels, x, y):
    """Return a bitmap as Supervisely writes it: a PNG whose alpha is the mask."""
    rgba = np.zeros((*pixels.shape, 4), np.uint8)
    rgba[..., 3] = pixels * 255
    data = zlib.compress(cv2.imencode('.png', rgba)[1].tobytes())
    return dict(data=base64.b64encode(data).decode(), origin=[x, y])


FORMATS = {  # what is written -> what the report calls it
    as_label_studio: 'Label Studio', as_label_studio_min: 'Label Studio', as_via_1: 'VIA', as_via_2: 'VIA',
    as_createml: 'CreateML', as_image_folder: 'ImageFolder', as_image_folder_csv: 'ImageFolder',
    as_supervisely: 'Supervisely', as_panoptic: 'COCO panoptic',
}  # fmt: skip
