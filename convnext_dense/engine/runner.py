"""A runner whose runs can be killed at any instant and go on as the same run."""

import copy
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, LOOPS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from ..checkpoints.io import read
from ..cli.exit import last_line
from ..config.resume import OVERRIDE, replay, take_own_settings
from ..errors import RunError, UsageError
from ..type_names import class_of
from .checkpoint_hook import (
    PatientLoggerHook,
    WholeCheckpointHook,
    accumulation_of,
    full_disk_said,
    layout_of,
    quiet_when_full,
    write_whole,
)
from .health_hook import GONE, ActHook, GuardHook, cause_of
from .samplers import NO_BATCH, apart, drawn, name_images

EVALUATED = 'last_evaluation'  # holds how far the run was at the last evaluation that was finished
PAUSE = 5  # seconds in which another process may say what ended it
OURS = {'CheckpointHook': WholeCheckpointHook, 'LoggerHook': PatientLoggerHook}


class ResumableRunner(Runner):
    """mmengine's runner with training batches that follow from the seed, whole checkpoints, and a guard over the run.

    The config stays as it is; parts of the user's own (loops, data loaders, hooks) are kept, and then owe these
    promises themselves.
    """

    def train(self):
        if self._resume and self._load_from:
            seed = read(self._load_from).get('meta', {}).get('seed')
            own = self.cfg.get(OVERRIDE) and self._randomness_cfg.get('seed') is not None
            if seed is not None and not own:  # before the data are put in order
                self._randomness_cfg.update(seed=seed)
                self.set_randomness(**self._randomness_cfg)
        # Beside the GPUs' own group: it does not wait for them, and notices at once who is gone.
        self.cpu_group = torch.distributed.new_group(backend='gloo') if get_world_size() > 1 else None
        guard = GuardHook(self.cfg.get('max_bad_images', 0.001))
        self.register_hook(guard)
        self.register_hook(ActHook(guard))
        self.register_hook(ResumeHook())
        try:
            with guard:
                return super().train()
        except Exception as error:
            line = cause_of(error, self.model, guard.shape)
            if get_world_size() > 1:
                line = first_cause(Path(self.log_dir), line, error)
            if line:
                raise RunError(line) from error
            raise

    def build_logger(self, *args, **kwargs):
        logger = super().build_logger(*args, **kwargs)
        quiet_when_full(logger)
        return logger

    def build_train_loop(self, loop):
        if isinstance(self._train_dataloader, dict):
            if isinstance(loop, dict):
                loop = copy.deepcopy(loop)
                by_epoch = loop.pop('by_epoch', None)
                kind = loop.get('type') or ('EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop')
                loop['type'] = RESUMABLE.get(_host_name(kind), kind)
            ours = isinstance(loop, dict) and loop['type'] is IterLoop
            self._train_dataloader = drawn(self._train_dataloader, opened=not ours)
        return super().build_train_loop(loop)

    def scale_lr(self, optim_wrapper, auto_scale_lr=None):
        """mmengine's, which takes one batch for all images of an update; here it is one of those that are added up."""
        n = getattr(optim_wrapper, '_accumulative_counts', 1)
        if auto_scale_lr and auto_scale_lr.get('enable') and n > 1:
            base = auto_scale_lr['base_batch_size']
            self.logger.info(
                f'auto_scale_lr: {n} batches are added up, so base_batch_size {base} is {base / n:g} a batch'
            )
            auto_scale_lr = {**auto_scale_lr, 'base_batch_size': base / n}
        return super().scale_lr(optim_wrapper, auto_scale_lr)

    @staticmethod
    def build_dataloader(dataloader, *args, **kwargs) -> DataLoader:
        loader = Runner.build_dataloader(dataloader, *args, **kwargs)
        name_images(loader.dataset)
        loader.worker_init_fn = partial(apart, loader.worker_init_fn)
        return loader

    def call_hook(self, fn_name: str, **kwargs) -> None:
        """mmengine's, without the try that leaves out of a TypeError where in the hook it was raised."""
        for hook in self._hooks:
            if hasattr(hook, fn_name):
                getattr(hook, fn_name)(self, **kwargs)

    def register_hook(self, hook, priority=None) -> None:
        if isinstance(hook, dict):
            hook = {**hook, 'type': OURS.get(_host_name(hook.get('type')), hook.get('type'))}
        super().register_hook(hook, priority)


def _host_name(kind) -> str | None:
    """The name of one of mmengine's own classes, which a config may give with a scope, by its path or as itself."""
    found = class_of(kind, LOOPS, HOOKS)
    return found.__name__ if found is not None and found.__module__.startswith('mmengine.') else None


def first_cause(folder: Path, line: str | None, error: Exception) -> str | None:
    """What ended a run of several processes: each leaves its cause in the log folder, and the ones that noticed no more
    than the end of another look for that one's."""
    own = folder / f'ended_rank_{get_rank()}.txt'
    with suppress(OSError):
        write_whole(own, (line or last_line(error)).encode())
    if line != GONE:
        return line and f'rank {get_rank()}: {line}'
    time.sleep(PAUSE)
    words = {int(path.stem.split('_')[-1]): path.read_text() for path in folder.glob('ended_rank_*.txt')}
    causes = [f'rank {rank}: {text}' for rank, text in sorted(words.items()) if text != GONE]
    silent = [str(rank) for rank in range(get_world_size()) if rank not in words]
    if not causes and silent:
        causes = [f'rank {" and ".join(silent)} ended without a word: killed, or out of memory']
    return f'{GONE}: {causes[0]}' if causes else GONE


class EpochLoop(EpochBasedTrainLoop):
    """mmengine's loop; a run that stopped in the middle of an epoch goes on there."""

    def run(self) -> torch.nn.Module:
        self._done = self._iter - self._epoch * len(self.dataloader)
        return super().run()

    def run_epoch(self) -> None:
        done, self._done = self._done, 0  # of the first epoch alone
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        self.dataloader.batch_sampler.skip(done)
        for idx, data_batch in enumerate(self.dataloader, done):
            self.run_iter(idx, data_batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1


class IterLoop(IterBasedTrainLoop):
    """mmengine's loop; a run that is resumed skips what it has seen without reading it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dataloader_iterator = Batches(self)
        self.fast_forward_on_resume = False  # as it costs nothing here


RESUMABLE = {'EpochBasedTrainLoop': EpochLoop, 'IterBasedTrainLoop': IterLoop}


class Batches:
    """Batches without end, from the one on at which a loop that counts iterations begins."""

    def __init__(self, loop: IterLoop):
        self.loop, self.loader = loop, loop.dataloader
        self.skipped, self.epoch, self.batches = 0, 0, None

    def skip_iter(self, n: int) -> None:
        """mmengine from 0.10.12 on asks for batches to be skipped; before, it takes as many and drops them."""
        self.skipped = n

    def __iter__(self):
        return self

    def __next__(self):
        if self.batches is None:
            if self.skipped < self.loop.iter:
                self.skipped += 1
                return None
            self.epoch = self.loader.batch_sampler.skip(self.skipped)
            self.batches = iter(self.loader)
        batch = next(self.batches, None)
        if batch is None:
            self.epoch += 1
            self.loader.batch_sampler.sampler.set_epoch(self.epoch)
            self.batches = iter(self.loader)
            batch = next(self.batches, None)
        if batch is None:
            raise UsageError(NO_BATCH)
        return batch


class ResumeHook(Hook):
    """Fills in what mmengine's resuming leaves out: counts for another layout of the batches, gradients that were being
    added up, and an evaluation that was cut off."""

    priority = 'LOWEST'
    _replays = False

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        meta, now = checkpoint.get('meta', {}), layout_of(runner) if runner._resume else None
        self._replays = bool(runner._resume and runner.cfg.get(OVERRIDE))
        if self._replays:
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
            take_own_settings(runner.optim_wrapper, checkpoint)
        by_epoch = isinstance(runner._train_loop, EpochBasedTrainLoop)
        if now is None or 'layout' not in meta:
            if now and by_epoch:  # of another tool, which saves where epochs end
                meta['iter'] = meta['epoch'] * now['batches']
            return
        meta['iter'], note = moved(meta['epoch'], meta['iter'], meta['layout'], now, by_epoch)
        if note:
            runner.logger.warning(note)
        if checkpoint.get('gradients'):
            _set_gradients(runner.model, checkpoint['gradients'])
            # mmengine warns that they are lost.
            runner.logger.addFilter(lambda record: 'Resumed iteration number is not div' not in record.getMessage())

    def before_train(self, runner) -> None:
        self.evaluated = Path(runner.work_dir, EVALUATED)
        if self._replays:
            replay(runner)
        if runner._resume and runner.val_loop is not None and due(runner.train_loop):
            done = int(self.evaluated.read_text()) if self.evaluated.exists() else 0
            if done < reached(runner):
                runner.logger.info('the evaluation that belongs to this checkpoint was not finished: evaluating')
                runner.val_loop.run()

    def after_val_epoch(self, runner, metrics=None) -> None:
        if is_main_process():
            with full_disk_said(runner):
                write_whole(self.evaluated, str(reached(runner)).encode())


def moved(epoch: int, iteration: int, before: dict, now: dict, by_epoch: bool) -> tuple[int, str | None]:
    """The count of iterations of a run that goes on with another layout of its batches (`saving.layout_of`), and what
    is to be said of it. With the same total batch an update sees the same images as before, and the order goes on.

    Raises:
        UsageError: the data are others, or the place is within a batch of the new layout.
    """
    orders = before.get('order'), now.get('order')
    note = None
    if all(orders) and orders[0] != orders[1]:
        note = 'the training data are in another order than when the run stopped, or have other names: other batches'
    before, now = ({key: value for key, value in layout.items() if key != 'order'} for layout in (before, now))
    if before == now:
        return iteration, note
    if before['samples'] != now['samples']:
        raise UsageError(
            f'the training data hold {now["samples"]} images, {before["samples"]} when the run stopped: give it the '
            'same data, or start a run from its weights with --cfg-options load_from=CHECKPOINT'
        )
    at_once = [layout['processes'] * layout['images'] for layout in (before, now)]
    line = f'resumed on {now["processes"]} x {now["images"]} images, before {before["processes"]} x {before["images"]}'
    passed = epoch * before['batches'] if by_epoch else 0
    if at_once[0] * before['accumulation'] != at_once[1] * now['accumulation']:
        if before['accumulation'] != now['accumulation'] or (by_epoch and iteration != passed):
            raise UsageError(
                f'{line}, and the total batch was {at_once[0] * before["accumulation"]}, now '
                f'{at_once[1] * now["accumulation"]}: resume with the total batch of before'
            )
        done = 0 if by_epoch else iteration
        line += ': the total batch is another one, and so is the order of the data'
    else:
        images = (iteration - passed) * at_once[0]
        if images % at_once[1]:
            raise UsageError(f'{line}: the run stopped within a batch of now; resume with the images of before')
        done = images // at_once[1]
        line += ': the same total batch'
        if not by_epoch or before['samples'] % (at_once[0] * before['accumulation']) == 0:
            line += ', the same images in each update unless they are grouped by shape'
        else:
            line += '; the last update of an epoch and the first of the next take other images together'
    return (epoch * now['batches'] if by_epoch else 0) + done, f'{line}; {note}' if note else line


def _set_gradients(model: torch.nn.Module, gradients: list[dict]) -> None:
    """Give the parameters the gradients added up by this process; by all, where their number is another now."""
    chosen = [gradients[get_rank()]] if len(gradients) == get_world_size() else gradients
    for name, parameter in model.named_parameters():
        name = name.removeprefix('module.')
        found = [each[name] for each in chosen if name in each]
        if found:
            parameter.grad = (sum(found) / len(chosen)).to(parameter)


def reached(runner) -> int:
    """How far a run has come, in epochs, or in updates where it counts iterations: on any number of processes."""
    by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
    return runner.epoch if by_epoch else runner.iter // accumulation_of(runner)


def due(loop) -> bool:
    """Whether an evaluation belongs to where a training loop stands."""
    loop._decide_current_val_interval()
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    if by_epoch and loop.iter != loop.epoch * len(loop.dataloader):
        return False
    count, end = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
    return count >= max(loop.val_begin, 1) and (count % loop.val_interval == 0 or count == end)
