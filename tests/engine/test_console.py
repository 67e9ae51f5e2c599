"""Console output of a run, and messages that only its log file has."""

import logging

import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseModel

from convnext_dense.engine.console import FILE_ONLY, log_details_to_file_only
from convnext_dense.engine.runner import ResumableRunner


class EmptyModel(BaseModel):
    """A model that a runner can be built with."""

    def forward(self, *args, **kwargs):
        return {}


def test_environment_config_and_hooks_go_to_log_file_only(tmp_path, capsys):
    runner = ResumableRunner(
        EmptyModel(),
        work_dir=str(tmp_path),
        cfg=Config({'of_the_config': 1}),
        experiment_name='console',
        log_level='INFO',
    )
    runner.logger.info('a line of training')

    console, (path,) = capsys.readouterr().out, tmp_path.rglob('*.log')
    file = path.read_text()
    for words in ('System environment:', 'Runtime environment:', 'of_the_config = 1', 'before_train:'):
        assert words in file and words not in console
    for line in ('a line of training', f'Environment and full config: {path}'):
        assert line in file and line in console


def test_console_shows_everything_without_log_file(capsys):
    logger = MMLogger('console-alone')
    log_details_to_file_only(logger)
    logger.info(FILE_ONLY[1] + 'of_the_config = 1')

    assert 'of_the_config = 1' in capsys.readouterr().out


@pytest.mark.parametrize('message', ['Config of 13 recipes', 'Hooks', 'System environment: fine'])
def test_other_messages_reach_console(message, tmp_path, capsys):
    logger = MMLogger(f'console-{message}', log_file=str(tmp_path / 'run.log'))
    log_details_to_file_only(logger)
    logger.log(logging.INFO, message)

    assert message in capsys.readouterr().out
