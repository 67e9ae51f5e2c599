"""tools/predict.py: predictions for files of any kind, one-line errors for bad input."""

import json
import os

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from convnext_dense.cli import predict as tool
from convnext_dense.errors import UsageError
from convnext_dense.inference.video import VideoReader
from helpers.checkpoints import draw_photo
from helpers.tools import one_line_error


def predict(*args):
    """Run the tool in this process; return its exit code."""
    return tool.predict(tool.make_predict_parser('').parse_args([*map(str, args), '--device', 'cpu']))


UNREADABLE = {'broken.jpg', 'empty.png', 'text.jpg', 'thin.png'}
READABLE = {
    'one pixel.png',
    'gray16.png',
    'cmyk.jpg',
    'animated.gif',
    "it's.png",
    'say "x".png',
    'größe 图.jpg',
    'sub dir/a.jpg',
}
READABLE |= {'alpha.png', 'palette.png', 'a.jpg', 'a.png'}


@pytest.fixture(scope='module')
def unusual_files(tmp_path_factory, photos):
    folder, photo = tmp_path_factory.mktemp('odd'), cv2.imread(str(photos[0]))
    (folder / 'sub dir').mkdir()
    jpeg = cv2.imencode('.jpg', photo)[1].tobytes()
    for name in ('a.jpg', 'größe 图.jpg', 'sub dir/a.jpg'):
        (folder / name).write_bytes(jpeg)
    (folder / 'broken.jpg').write_bytes(jpeg[: len(jpeg) // 2])
    (folder / 'empty.png').write_bytes(b'')
    (folder / 'text.jpg').write_text('no image')
    for name in ("it's.png", 'say "x".png', 'a.png'):
        (folder / name).write_bytes(cv2.imencode('.png', photo)[1].tobytes())
    cv2.imwrite(str(folder / 'one pixel.png'), photo[:1, :1])
    cv2.imwrite(str(folder / 'gray16.png'), photo[..., 0].astype(np.uint16) * 257)
    cv2.imwrite(str(folder / 'thin.png'), np.zeros((10, 30000, 3), np.uint8))
    image = Image.fromarray(photo[..., ::-1])
    image.convert('CMYK').save(folder / 'cmyk.jpg')
    image.quantize(16).save(folder / 'palette.png')
    image.convert('RGBA').save(folder / 'alpha.png')
    image.save(folder / 'animated.gif', save_all=True, append_images=[image.rotate(90, expand=False)])
    return folder


def list_files(folder, suffix):
    return {str(path.relative_to(folder)) for path in folder.rglob(f'*{suffix}')}


def assert_reported(lines, folder):
    for name in UNREADABLE:
        assert sum(f'skipped {folder / name}: ' in line for line in lines) == 1, name
    assert any('animated.gif: the first of 2 frames' in line for line in lines)


def test_detection_of_a_folder_with_unusual_files(unusual_files, checkpoints, tmp_path, run_tool):
    process = run_tool(
        'predict.py', checkpoints['mask_rcnn'], unusual_files, '--out', tmp_path / 'out', '--device', 'cpu'
    )
    assert process.returncode == 1, process.stderr
    assert_reported(process.stderr.splitlines(), unusual_files)
    assert '12 images, ' in process.stdout and '4 skipped' in process.stdout
    content = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert {image['file_name'] for image in content['images']} == READABLE
    sizes = {image['file_name']: (image['width'], image['height']) for image in content['images']}
    assert sizes['one pixel.png'] == (1, 1)
    assert len(content['annotations']) > 100
    stems = {os.path.splitext(name)[0] if name not in ('a.jpg', 'a.png') else name for name in READABLE}
    assert list_files(tmp_path / 'out/pictures', '.jpg') == {f'{stem}.jpg' for stem in stems}


def test_segmentation_of_a_folder_with_unusual_files(unusual_files, checkpoints, tmp_path, capsys, predictors):
    assert predict(checkpoints['upernet'], unusual_files, '--out', tmp_path / 'out', '--no-pictures') == 1
    assert_reported(capsys.readouterr().err.splitlines(), unusual_files)
    masks = list_files(tmp_path / 'out/masks', '.png')
    assert len(masks) == len(READABLE) and not (tmp_path / 'out/pictures').exists()
    assert (tmp_path / 'out/classes.txt').read_text().split() == ['ground', 'disc', 'square', 'triangle', 'cross']
    with Image.open(tmp_path / 'out/masks/palette.png') as mask:
        expected = predictors['upernet'].predict(unusual_files / 'palette.png').pred_sem_seg.data[0]
        assert mask.mode == 'P' and np.array_equal(np.asarray(mask), expected)
        assert mask.getpalette()[3:6] == [220, 60, 50]


def test_output_is_not_overwritten_and_can_be_resumed(photos, checkpoints, tmp_path, capsys, monkeypatch):
    out, (photo_a, photo_b, photo_c) = tmp_path / 'out', photos[:3]
    assert predict(checkpoints['mask_rcnn'], photo_a, photo_b, '--out', out) == 0
    content_of_file = {path: path.read_bytes() for path in out.rglob('*') if path.is_file()}
    with pytest.raises(UsageError, match='already exists: choose another one, or continue there with --resume'):
        predict(checkpoints['mask_rcnn'], photo_c, '--out', out)
    with pytest.raises(UsageError, match=r'was made with score_thr None, not 0.5'):
        predict(checkpoints['mask_rcnn'], photo_c, '--out', out, '--resume', '--score-thr', 0.5)
    with pytest.raises(UsageError, match='was made with checkpoint'):
        predict(checkpoints['cascade'], photo_c, '--out', out, '--resume')
    assert {path: path.read_bytes() for path in out.rglob('*') if path.is_file()} == content_of_file

    # Existing predictions are kept; missing pictures are drawn again.
    names = []
    monkeypatch.setattr(tool, 'predict_files', record_names(tool.predict_files, names))
    (out / 'pictures' / f'{photo_b.stem}.jpg').unlink()
    assert predict(checkpoints['mask_rcnn'], photo_a, photo_b, photo_c, '--out', out, '--resume') == 0
    assert names == [photo_b.name, photo_c.name]
    content = json.loads((out / 'predictions.json').read_text())
    assert [image['file_name'] for image in content['images']] == [photo_a.name, photo_b.name, photo_c.name]
    monkeypatch.setattr(tool, 'build_predictor', None)
    assert (
        predict(checkpoints['mask_rcnn'], photo_a, photo_b, photo_c, '--out', out, '--resume') == 0
    )  # without a model
    complete = tmp_path / 'at once'
    monkeypatch.undo()
    assert predict(checkpoints['mask_rcnn'], photo_a, photo_b, photo_c, '--out', complete) == 0
    assert json.loads((complete / 'predictions.json').read_text()) == content


def record_names(function, names):
    def record(predictor, files, *args):
        names.extend(file.file_name for file in files)
        return function(predictor, files, *args)

    return record


def test_options_filter_detections(photos, checkpoints, tmp_path, predictors):
    def run(name, *options):
        assert predict(checkpoints['mask_rcnn'], *photos[:3], '--out', tmp_path / name, *options) == 0
        return json.loads((tmp_path / name / 'predictions.json').read_text())

    all_annotations = run('every', '--no-pictures')['annotations']
    scores = sorted(a['score'] for a in all_annotations)
    threshold = scores[len(scores) // 2]
    assert [a['score'] >= threshold for a in all_annotations].count(True) == len(
        run('score', '--score-thr', threshold, '--no-pictures')['annotations']
    )
    squares = run('classes', '--classes', 'square', 'disc', '--no-pictures', '--batch-size', 2)['annotations']
    assert len(squares) == sum(a['category_id'] in (1, 2) for a in all_annotations)
    top2 = run('best', '--max-per-image', 2, '--format', 'results', '--no-pictures')
    for i in (1, 2, 3):
        expected = sorted((a['score'] for a in all_annotations if a['image_id'] == i), reverse=True)[:2]
        assert sorted((a['score'] for a in top2 if a['image_id'] == i), reverse=True) == pytest.approx(expected)
    assert not list(tmp_path.rglob('pictures'))


def test_options_of_segmentation(photos, checkpoints, tmp_path):
    assert predict(checkpoints['upernet'], photos[1], '--out', tmp_path / 'every', '--amp-dtype', 'bfloat16') == 0
    assert predict(checkpoints['upernet'], photos[1], '--out', tmp_path / 'two', '--classes', 'disc', 'cross') == 0
    assert predict(checkpoints['upernet'], photos[1], '--out', tmp_path / 'multi', '--multiscale') == 0
    with Image.open(tmp_path / f'two/masks/{photos[1].stem}.png') as mask:
        assert set(np.unique(mask)) <= {1, 4, 255}
    with Image.open(tmp_path / f'multi/masks/{photos[1].stem}.png') as mask:
        assert set(np.unique(mask)) <= set(range(5))


@pytest.fixture(scope='module')
def video(tmp_path_factory, photos):
    path = tmp_path_factory.mktemp('video') / 'a clip.mp4'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), 10, (96, 64))
    photo = cv2.resize(cv2.imread(str(photos[0])), (200, 100))
    for i in range(50):
        writer.write(np.ascontiguousarray(photo[10:74, 2 * i : 2 * i + 96]))
    writer.release()
    return path


def count_frames(path):
    return sum(1 for _ in VideoReader(path))


def test_detection_in_a_video(video, checkpoints, tmp_path, predictors):
    out = tmp_path / 'out'
    assert predict(checkpoints['mask_rcnn'], video, '--out', out, '--max-per-image', 5) == 0
    content = json.loads((out / 'videos/a clip.json').read_text())
    assert [image['frame_index'] for image in content['images']] == list(range(50))
    assert content['images'][10]['timestamp'] == 1.0
    assert count_frames(out / 'videos/a clip.mp4') == 50
    frame = next(f for i, f in enumerate(VideoReader(video)) if i == 7)
    expected = predictors['mask_rcnn'].predict(frame, channel_order='bgr', max_per_image=5).pred_instances.scores
    scores = [a['score'] for a in content['annotations'] if a['image_id'] == content['images'][7]['id']]
    assert scores == pytest.approx(expected.tolist())
    assert not list(out.rglob('*.part*')) and not list((out / 'videos').glob('*.jsonl'))
    assert predict(checkpoints['mask_rcnn'], video, '--out', out, '--max-per-image', 5, '--resume') == 0


def test_segmentation_of_a_video(video, checkpoints, tmp_path, capsys):
    out = tmp_path / 'out'
    (tmp_path / 'broken.mp4').write_bytes(video.read_bytes()[:2000])
    assert predict(checkpoints['upernet'], video, tmp_path / 'broken.mp4', '--out', out, '--batch-size', 8) == 1
    assert f'skipped {tmp_path / "broken.mp4"}: no readable video' in capsys.readouterr().err
    content = json.loads((out / 'videos/a clip.json').read_text())
    assert [frame['frame_index'] for frame in content['frames']] == list(range(50)) and content['fps'] == 10
    assert count_frames(out / 'videos/a clip.mp4') == 50
    assert all((out / frame['mask']).is_file() for frame in content['frames'])


BAD_INPUT = {
    'no images': (['EMPTY'], 'no images in'),
    'no such file': (['none.jpg'], "no image or folder 'none.jpg'"),
    'no config': (['PHOTO', 'NO_CONFIG'], 'contains no config: give the config'),
    'no checkpoint': (['PHOTO', '/none.pth'], "no checkpoint '/none.pth'"),
    'another task': (['PHOTO', '--config', 'SEGMENTOR'], 'is a model for detection, the config is for segmentation'),
    'no such class': (['PHOTO', '--classes', 'squares'], "no class 'squares': did you mean square?"),
    'no such device': (['PHOTO', '--device', 'cuda:7'], "no device 'cuda:7'"),
    'no device at all': (['PHOTO', '--device', 'toaster'], "no device 'toaster'"),
    'a folder that cannot be written': (['PHOTO', '--out', '/proc/none'], "--out '/proc/none' cannot be written"),
    'a file as folder': (['PHOTO', '--out', 'FILE/x'], 'cannot be written'),
    'a score': (['PHOTO', '--score-thr', '50'], 'give a number from 0 to 1'),
    'an overlap': (['PHOTO', '--tile', '64', '--overlap', '1'], 'give a fraction'),
    'an option of detection': (['PHOTO', 'UPERNET', '--score-thr', '0.5'], '--score-thr is for detection'),
    'a format of detection': (['PHOTO', 'UPERNET', '--format', 'results'], '--format results is for detection'),
    'no display': (['PHOTO', '--show'], '--show: there is no display'),
}


@pytest.fixture
def bad_args(checkpoints, photos, tmp_path):
    """Make the arguments of a case, checkpoint first."""
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_text('')
    torch.save(dict(state_dict=torch.load(checkpoints['mask_rcnn'])['state_dict']), tmp_path / 'bare.pth')
    values = dict(
        EMPTY=tmp_path / 'empty',
        PHOTO=photos[0],
        NO_CONFIG=tmp_path / 'bare.pth',
        SEGMENTOR='configs/demo/upernet.py',
        UPERNET=checkpoints['upernet'],
    )

    def make_args(case):
        values_of_args = [str(values.get(arg, arg)).replace('FILE/', f'{tmp_path}/file/') for arg in BAD_INPUT[case][0]]
        checkpoint = next((arg for arg in values_of_args if arg.endswith('.pth')), str(checkpoints['mask_rcnn']))
        values_of_args = [checkpoint, *(arg for arg in values_of_args if arg != checkpoint)]
        return values_of_args + ([] if '--out' in values_of_args else ['--out', str(tmp_path / 'out')])

    return make_args


@pytest.mark.parametrize('case', BAD_INPUT)
def test_bad_input_is_a_one_line_error_before_the_model_is_built(case, bad_args, monkeypatch, tmp_path):
    monkeypatch.delenv('DISPLAY', raising=False)
    monkeypatch.delenv('WAYLAND_DISPLAY', raising=False)
    monkeypatch.setattr(tool, 'build_predictor', lambda *args: pytest.fail('the model is built'))
    with pytest.raises(UsageError) as error:
        tool.predict(tool.make_predict_parser('').parse_args(bad_args(case)))
    assert BAD_INPUT[case][1] in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_bad_input_has_exit_code_2(bad_args, run_tool):
    one_line_error(run_tool('predict.py', *bad_args('no such class')), "no class 'squares'")
    process = run_tool('predict.py', 'only.pth')
    assert process.returncode == 2 and 'INPUT' in process.stderr


def test_tiles_of_large_images(checkpoints, tmp_path):
    """The picture is a reduced image; detections are in the coordinates of the full image."""
    photo = draw_photo(np.random.RandomState(3), 300, 5000)
    cv2.imwrite(str(tmp_path / 'plate.png'), photo)
    args = (tmp_path / 'plate.png', '--tile', 256)
    assert predict(checkpoints['mask_rcnn'], *args, '--out', tmp_path / 'det', '--max-per-image', 20) == 0
    content = json.loads((tmp_path / 'det/predictions.json').read_text())
    assert (content['images'][0]['width'], content['images'][0]['height']) == (5000, 300)
    assert len(content['annotations']) == 20
    assert all(a['segmentation']['size'] == [300, 5000] for a in content['annotations'])
    picture = cv2.imread(str(tmp_path / 'det/pictures/plate.jpg'))
    assert picture.shape == (246, 4096, 3)
    reduced = cv2.resize(photo, picture.shape[1::-1], interpolation=cv2.INTER_AREA).astype(int)
    assert np.median(np.abs(picture - reduced)) < 8
    assert predict(checkpoints['upernet'], *args, '--out', tmp_path / 'seg') == 0
    with Image.open(tmp_path / 'seg/masks/plate.png') as mask:
        assert mask.size == (5000, 300)
    assert cv2.imread(str(tmp_path / 'seg/pictures/plate.jpg')).shape[1] == 4096
