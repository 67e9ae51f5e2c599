"""The arguments that the command-line tools share."""

import argparse
import difflib
import re
from collections.abc import Iterator

from ..config.options import KeyValueAction
from .exit import printable


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, which takes no abbreviations, names the nearest option to one that is not known, and has --debug."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{'allow_abbrev': False, **kwargs})
        self.add_argument('--debug', action='store_true', help='show the traceback behind an error of one line')

    def error(self, message: str):
        unknown = re.match('unrecognized arguments: (--[^ =]+)', message)
        options = [option for action in self._all_actions() for option in action.option_strings]
        near = unknown and difflib.get_close_matches(unknown[1], options, 1, 0.6)
        super().error(f'{printable(message)}: perhaps {near[0]}' if near else printable(message))

    def _all_actions(self) -> Iterator[argparse.Action]:
        for action in self._actions:
            yield action
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._actions


def make_config_parser(description: str, **config) -> ArgumentParser:
    """The arguments of every tool that reads a config; `config` is for argparse."""
    parser = ArgumentParser(description=description)
    parser.add_argument('config', help='a recipe, such as configs/cascade/convnext_t.py', **config)
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=KeyValueAction,
        default={},
        metavar='KEY=VALUE',
        help='settings that replace those of the config, such as train_cfg.max_epochs=12; +KEY=VALUE for a new one',
    )
    return parser


def make_run_parser(description: str) -> ArgumentParser:
    """The arguments of every tool that runs a config, as users of mmdet and mmseg know them."""
    parser = make_config_parser(description)
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/ and the recipe)')
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none')
    parser.add_argument('--compile', action='store_true', help="torch.compile the backbone's blocks: for long runs")
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser
