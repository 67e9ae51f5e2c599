"""Arguments that the command-line tools share."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence

from ..config.image_size import add_image_size_argument
from ..config.launch import is_rank0
from ..config.options import KeyValueAction
from .exit import DEBUG_VARIABLE, printable

# Old spelling of an option -> its name. Every parser that has the new option accepts the old one with a warning.
RENAMED_OPTIONS = {
    '--as-is': '--no-auto-batch',
    '--keep': '--max-keep-ckpts',
    '--log-to': '--loggers',
    '--max-bad-images': '--max-unreadable',
    '--peers': '--baselines',
    '--picture': '--plot',
    '--val-share': '--val-fraction',
}


class ArgumentParser(argparse.ArgumentParser):
    """Argument parser of the tools.

    Unlike argparse's own it accepts no abbreviations, suggests the nearest option for an unknown one, accepts old
    spellings (`RENAMED_OPTIONS`) with a warning, and adds `--debug`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{'allow_abbrev': False, **kwargs})
        help_text = f'show the traceback behind a one-line error (also with {DEBUG_VARIABLE}=1 in the environment)'
        self.add_argument('--debug', action='store_true', help=help_text)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """Parse arguments as argparse does, old spellings of options included."""
        args = list(sys.argv[1:] if args is None else args)
        end = args.index('--') if '--' in args else len(args)
        return super().parse_known_args([*map(self._current_spelling, args[:end]), *args[end:]], namespace)

    def _current_spelling(self, arg: str) -> str:
        old, equals, value = arg.partition('=')
        new = RENAMED_OPTIONS.get(old)
        if new not in self._option_string_actions or old in self._option_string_actions:
            return arg
        if is_rank0():
            print(f'warning: {old} was renamed to {new}; please use the new name', file=sys.stderr)
        return new + equals + value

    def error(self, message: str):
        """Exit with code 2, suggesting the nearest option for an unknown one."""
        unknown = re.match('unrecognized arguments: (--[^ =]+)', message)
        options = [option for action in self._all_actions() for option in action.option_strings]
        near = unknown and difflib.get_close_matches(unknown[1], options, 1, 0.6)
        super().error(f'{printable(message)} (did you mean {near[0]}?)' if near else printable(message))

    def _all_actions(self) -> Iterator[argparse.Action]:
        for action in self._actions:
            yield action
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._actions


def integer(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Return an argparse type for integers in a range, both ends included."""

    def parse(text: str) -> int:
        value = int(text) if re.fullmatch('-?[0-9]+', text) else None
        if value is None or value < minimum or (maximum is not None and value > maximum):
            limits = f'an integer from {minimum}' + ('' if maximum is None else f' to {maximum}')
            raise argparse.ArgumentTypeError(f'{text!r}: give {limits}')
        return value

    return parse


def make_config_parser(description: str, **config) -> ArgumentParser:
    """Return a parser with the arguments of every tool that reads a config, whose settings are `**config`."""
    parser = ArgumentParser(description=description)
    parser.add_argument('config', help='config file, such as configs/cascade/convnext_t.py', **config)
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=KeyValueAction,
        default={},
        metavar='KEY=VALUE',
        help='settings that override the config, such as train_cfg.max_epochs=12; +KEY=VALUE adds a new one',
    )
    return parser


def make_run_parser(description: str) -> ArgumentParser:
    """Return a parser with the arguments of the tools that run a config, named as those of mmdet and mmseg."""
    parser = make_config_parser(description)
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/RECIPE)')
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none')
    add_image_size_argument(parser)
    parser.add_argument('--compile', action='store_true', help="torch.compile the backbone's blocks, for long runs")
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser
