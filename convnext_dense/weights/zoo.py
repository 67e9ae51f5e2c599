"""Known weights by name, and where a name, a path or a URL leads to."""

import hashlib
import os
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, is_main_process

from ..errors import UsageError

ORIGINAL = 'https://dl.fbaipublicfiles.com/convnext'
# The original's ImageNet weights from which the paper's dense results start: the final ones, not the EMA's.
NAMES = (
    'convnext_tiny_1k_224',
    'convnext_small_1k_224',
    'convnext_base_1k_224',
    'convnext_base_22k_224',
    'convnext_large_22k_224',
    'convnext_xlarge_22k_224',
)
# The original's finished detectors and segmentors.
DETECTORS = (
    'mask_rcnn_convnext_tiny_1k_3x',
    'cascade_mask_rcnn_convnext_tiny_1k_3x',
    'cascade_mask_rcnn_convnext_small_1k_3x',
    'cascade_mask_rcnn_convnext_base_1k_3x',
    'cascade_mask_rcnn_convnext_base_22k_3x',
    'cascade_mask_rcnn_convnext_large_22k_3x',
    'cascade_mask_rcnn_convnext_xlarge_22k_3x',
)
SEGMENTORS = (
    'upernet_convnext_tiny_1k_512x512',
    'upernet_convnext_small_1k_512x512',
    'upernet_convnext_base_1k_512x512',
    'upernet_convnext_base_22k_640x640',
    'upernet_convnext_large_22k_640x640',
    'upernet_convnext_xlarge_22k_640x640',
)
URLS = {
    **{name: f'{ORIGINAL}/{name}.pth' for name in NAMES},
    **{name: f'{ORIGINAL}/coco/{name}.pth' for name in DETECTORS},
    **{name: f'{ORIGINAL}/ade20k/{name}.pth' for name in SEGMENTORS},
}


def locate(source: str) -> str:
    """The path or URL that `source`, a known name, a path or a URL, stands for; nothing is downloaded.

    Raises:
        UsageError: it is no known name and no file is there.
    """
    place = URLS.get(source, source)
    if not is_url(place) and not os.path.isfile(place):
        raise UsageError(f"no checkpoint '{source}': give a file that exists, a URL or one of {', '.join(URLS)}")
    return place


def fetch(source: str) -> Path:
    """The local file of `source`; a URL is downloaded once into torch's hub folder, by the first process of a run."""
    place = locate(source)
    if not is_url(place):
        return Path(place)
    name = PurePosixPath(urlparse(place).path)
    # Other people's files are often called epoch_12.pth: their address goes into the name.
    mark = '' if source in URLS else f'-{hashlib.sha256(place.encode()).hexdigest()[:8]}'
    file = Path(torch.hub.get_dir(), 'checkpoints', f'{name.stem}{mark}{name.suffix}')
    if is_main_process():
        _download(place, file)
    barrier()
    _download(place, file)  # on other machines of the same run
    return file


def is_url(place: str) -> bool:
    return urlparse(str(place)).scheme in ('http', 'https')


def _download(url: str, file: Path) -> None:
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(file))  # into a temporary file, moved into place when whole
    except OSError as error:
        raise UsageError(
            f'cannot download {url} ({error}): fetch it elsewhere and put it at {file}, or give its path '
            'as init_cfg.checkpoint'
        ) from error
