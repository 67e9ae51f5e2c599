"""Download weights from the Hugging Face Hub with huggingface_hub, named like in timm: `hf-hub:owner/name`."""

import re
from functools import cache
from pathlib import Path

from mmengine.logging import print_log

from ..errors import UsageError

HF_PREFIX = 'hf-hub:'
HF_SITE = 'https://huggingface.co'
# Weight files as timm and transformers save them, in the order in which they are tried.
WEIGHT_FILES = ('model.safetensors', 'pytorch_model.bin')
NAME_RE = re.compile(r'[\w.-]+/[\w.-]+(?:@[\w./-]+)?')
LICENSE_RE = re.compile(r'^license(_name|_link)?:[ \t]*(\S.*?)[ \t]*$', re.MULTILINE)


def is_hf_name(source: str) -> bool:
    """Return whether a checkpoint is the name of a model on the Hugging Face Hub."""
    return str(source).startswith(HF_PREFIX)


def download_from_hf(source: str) -> Path:
    """Download the weights of a model on the Hugging Face Hub, and log its license once.

    huggingface_hub caches the file; with `HF_HUB_OFFLINE=1` no network is needed.

    Args:
        source: 'hf-hub:owner/name', or 'hf-hub:owner/name@revision'.

    Returns:
        The path of the file in the cache.

    Raises:
        UsageError: If the name is invalid, huggingface_hub is not installed, there is no such model, it is gated, or
            it is not in the cache and the hub cannot be reached.
    """
    name = source.removeprefix(HF_PREFIX)
    if not NAME_RE.fullmatch(name):
        raise UsageError(f"'{source}' is invalid: give hf-hub:owner/name, such as hf-hub:timm/convnext_tiny.in12k")
    repo, _, revision = name.partition('@')
    by_hand = f'download {HF_SITE}/{repo}/resolve/{revision or "main"}/{WEIGHT_FILES[0]} and give its path'
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError(f"'{source}' needs huggingface_hub: run pip install huggingface_hub, or {by_hand}") from error
    for file in WEIGHT_FILES:
        try:
            path = Path(huggingface_hub.hf_hub_download(repo, file, revision=revision or None))
        except (OSError, ValueError) as error:
            # Compared by name, because modules and bases of these classes differ between versions.
            names = {cls.__name__ for cls in type(error).__mro__}
            if 'EntryNotFoundError' in names and 'LocalEntryNotFoundError' not in names and file != WEIGHT_FILES[-1]:
                continue
            raise UsageError(f'{_describe(names, source, repo, error)}, or {by_hand}') from error
        _announce_license(source, repo, revision)
        return path
    raise AssertionError('the last file either returns or raises')


def _describe(names: set[str], source: str, repo: str, error: Exception) -> str:
    """Describe an error of huggingface_hub, by the names of its classes, with a hint."""
    if 'GatedRepoError' in names:
        return f"'{source}' is gated: accept its terms at {HF_SITE}/{repo} and log in with hf auth login"
    if 'RepositoryNotFoundError' in names:
        return f"'{source}': no model {HF_SITE}/{repo}, or it is private: check the name, log in with hf auth login"
    if 'RevisionNotFoundError' in names:
        return f"'{source}': the model has no such revision: leave out what follows @"
    if names & {'LocalEntryNotFoundError', 'OfflineModeIsEnabled'}:
        return f"'{source}' is not in the cache of huggingface_hub and the hub cannot be reached: connect once"
    if 'EntryNotFoundError' in names:
        return f"'{source}' has none of {', '.join(WEIGHT_FILES)}: give another model"
    return f"cannot download '{source}' ({' '.join(str(error).split())[:200]}): try again"


@cache
def _announce_license(source: str, repo: str, revision: str) -> None:
    """Log the license in the README of the model, once in this process."""
    import huggingface_hub

    try:
        readme = Path(huggingface_hub.hf_hub_download(repo, 'README.md', revision=revision or None))
        terms = dict(LICENSE_RE.findall(readme.read_text(encoding='utf-8', errors='replace')))
    except (OSError, ValueError):
        terms = {}
    name = terms.get('_name') or terms.get('')
    link = terms.get('_link') or f'{HF_SITE}/{repo}'
    print_log(f'{source}: license {name}, {link}' if name else f'{source}: license unknown, see {link}', 'current')
