"""Build the runner of a config and load the checkpoint it starts from."""

from collections.abc import Mapping

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner.checkpoint import get_torchvision_models
from torch import nn

from ..checkpoints.hub import download
from ..checkpoints.io import clear_cache, load_checkpoint
from ..checkpoints.pretrained import check_state_dict_matches, load_model_weights
from ..errors import UsageError, is_user_code_error, root_message
from ..mmengine_internals import checkpoint_schemes
from ..models.convnext import ConvNeXt
from ..models.optimize import optimize
from ..ops import dispatch
from .runner import ResumableRunner


def compile_backbones(model: nn.Module) -> None:
    """Have `torch.compile` compile the blocks of every ConvNeXt in a model when they first run."""
    for module in model.modules():
        if isinstance(module, ConvNeXt):
            module.compile_blocks()


def make_runner(config: Config, checkpoint: str | None = None) -> Runner:
    """Build the runner of a config and check that its checkpoint fits the model.

    Args:
        config: The config.
        checkpoint: Checkpoint of the whole model, to resume or test. Without it, the config's `load_from` is checked:
            its heads may differ (other classes), its backbone may not.

    Returns:
        The runner; the checkpoint is loaded when it trains or tests.

    Raises:
        UsageError: If the config cannot be built, or the checkpoint does not fit the model.
    """
    if not checkpoint and config.get('load_from'):
        config.load_from = str(download(config.load_from))
    file = checkpoint or config.get('load_from')
    models_by_file = {}  # filled below, once the model is built
    register_checkpoint_loader(models_by_file)
    try:
        runner = RUNNERS.build(config) if 'runner_type' in config else ResumableRunner.from_cfg(config)
    except (KeyError, TypeError, AssertionError, ValueError, AttributeError) as error:
        if isinstance(error, UsageError) or is_user_code_error(error):
            raise
        raise UsageError(f'the config cannot be built: {root_message(error)}') from error
    model = optimize(_unwrap_model(runner.model))
    if get_device() == 'cpu' and any(isinstance(module, ConvNeXt) for module in model.modules()):
        runner.logger.info(f'ConvNeXt on this CPU: {dispatch.backend_summary()}')
    if file:
        models_by_file[file] = model
        backbones = tuple(f'{name}.' for name, module in model.named_modules() if isinstance(module, ConvNeXt))
        check_state_dict_matches(
            model, load_model_weights(load_checkpoint(file), file, model), file, ('',) if checkpoint else backbones
        )
    return runner


def register_checkpoint_loader(models_by_file: Mapping[str, nn.Module] | None = None) -> None:
    """Have mmengine load all checkpoints (files, URLs, ...) without unpickling arbitrary objects.

    The config in a checkpoint, which mmengine would execute on resuming, is dropped.

    Args:
        models_by_file: By checkpoint file, the model to whose parameter names its weights are renamed.
    """

    def load(filename: str, map_location=None) -> dict:
        if filename.startswith('torchvision://'):
            filename = get_torchvision_models()[filename.removeprefix('torchvision://')]
        content = load_checkpoint(download(filename), mmap=False)
        clear_cache()  # from here on the run holds its own copy
        if models_by_file and filename in models_by_file:
            content['state_dict'] = load_model_weights(content, filename, models_by_file[filename])
        if isinstance(content.get('meta'), dict):
            content['meta'] = {k: v for k, v in content['meta'].items() if k not in ('cfg', 'config')}
        return content

    CheckpointLoader.register_scheme(checkpoint_schemes(), load, force=True)


def _unwrap_model(model: nn.Module) -> nn.Module:
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
