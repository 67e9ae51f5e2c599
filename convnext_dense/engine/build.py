"""Building the runner of a config, and loading the checkpoint that it starts from."""

import os
from collections.abc import Callable, Mapping

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner.checkpoint import get_torchvision_models
from torch import nn

from ..checkpoints.hub import WEIGHT_URLS, download, is_url
from ..checkpoints.io import clear_cache, load_checkpoint
from ..checkpoints.pretrained import check_state_dict_matches, load_model_weights
from ..errors import UsageError, is_user_code_error, root_message
from ..models.convnext import ConvNeXt
from ..ops import dispatch
from .runner import ResumableRunner

# All from which mmengine loads checkpoints: what our loader does not find there is an error.
LOADER_PREFIXES = (
    '',
    'http://',
    'https://',
    'torchvision://',
    'modelzoo://',
    'open-mmlab://',
    'openmmlab://',
    'mmcls://',
)
LOADER_PREFIXES += ('pavi://', 's3://', r'(\S+\:)?s3://')


def compile_backbones(model: nn.Module) -> None:
    """Have the blocks of every ConvNeXt in a model compiled when they first run."""
    for module in model.modules():
        if isinstance(module, ConvNeXt):
            module.compile_blocks()


def resolve_checkpoint(source: str) -> str:
    """The file of a checkpoint, downloaded where `source` is a URL or a known name; UsageError where there is none."""
    if not os.path.isfile(source) and not is_url(source) and source not in WEIGHT_URLS:
        raise UsageError(f"no checkpoint '{source}': give the path of a .pth file, a URL or a recipe's released name")
    return str(download(source))


def make_runner(config: Config, checkpoint: str | None = None) -> Runner:
    """The runner of a config. `checkpoint` is a training or a model that it is going to load; without it that is the
    config's `load_from`, whose heads may be another model's (other classes) while its backbone may not.

    Raises:
        UsageError: the file is not of the runner's model.
    """
    if not checkpoint and config.get('load_from'):
        config.load_from = resolve_checkpoint(config.load_from)
    file = checkpoint or config.get('load_from')
    whole = {}  # the file of the whole model, with the model, once that is there
    CheckpointLoader.register_scheme(prefixes=LOADER_PREFIXES, loader=_make_checkpoint_loader(whole), force=True)
    try:
        runner = RUNNERS.build(config) if 'runner_type' in config else ResumableRunner.from_cfg(config)
    except (KeyError, TypeError, AssertionError, ValueError, AttributeError) as error:
        if isinstance(error, UsageError) or is_user_code_error(error):
            raise
        raise UsageError(f'the config cannot be built: {root_message(error)}') from error
    model = _unwrap_model(runner.model)
    if get_device() == 'cpu' and any(isinstance(module, ConvNeXt) for module in model.modules()):
        runner.logger.info(f'ConvNeXt on this CPU: {dispatch.described()}')
    if file:
        whole[file] = model
        backbones = tuple(f'{name}.' for name, module in model.named_modules() if isinstance(module, ConvNeXt))
        check_state_dict_matches(
            model, load_model_weights(load_checkpoint(file), file, model), file, ('',) if checkpoint else backbones
        )
    return runner


def _make_checkpoint_loader(whole: Mapping[str, nn.Module]) -> Callable[..., dict]:
    """mmengine's loader of files for what our tools run: its own unpickles in full where the safe way fails, and a
    resumed runner runs the config in the file. Of the files in `whole` come the weights of the models there, by the
    names of these."""

    def load(filename: str, map_location=None) -> dict:
        if filename.startswith('torchvision://'):
            filename = get_torchvision_models()[filename.removeprefix('torchvision://')]
        content = load_checkpoint(resolve_checkpoint(filename), mapped=False)
        clear_cache()  # from here on the run has its own
        if filename in whole:
            content['state_dict'] = load_model_weights(content, filename, whole[filename])
        if isinstance(content.get('meta'), dict):
            content['meta'] = {k: v for k, v in content['meta'].items() if k not in ('cfg', 'config')}
        return content

    return load


def _unwrap_model(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
