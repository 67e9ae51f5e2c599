"""The arguments that the tools share: renamed options, --debug, tracebacks."""

import pytest

from convnext_dense.cli.arguments import RENAMED_OPTIONS, ArgumentParser, make_run_parser
from convnext_dense.config.load import load_config
from convnext_dense.datasets.custom import add_data_arguments
from helpers.paths import ROOT

DEMO = ROOT / 'configs/demo/mask_rcnn.py'


@pytest.mark.parametrize('old, new', RENAMED_OPTIONS.items())
def test_renamed_option_works_with_one_warning(old, new, capsys):
    parser = ArgumentParser()
    parser.add_argument(new)
    dest = new.lstrip('-').replace('-', '_')
    for args in ([old, '1'], [f'{old}=1']):
        assert getattr(parser.parse_args(args), dest) == '1'
        assert capsys.readouterr().err == f'warning: {old} was renamed to {new}; please use the new name\n'
    assert getattr(parser.parse_args([new, '1']), dest) == '1' and capsys.readouterr().err == ''
    assert old not in parser.format_help()


def test_old_option_names_are_not_replaced_in_other_parsers(capsys):
    parser = ArgumentParser()
    parser.add_argument('--keep')
    parser.add_argument('rest', nargs='*')
    args = parser.parse_args(['--keep', '1', '--', '--val-share'])
    assert (args.keep, args.rest) == ('1', ['--val-share']) and capsys.readouterr().err == ''
    with pytest.raises(SystemExit):
        parser.parse_args(['--log-to', 'wandb'])  # without --loggers it is unknown


def test_renamed_options_in_groups_and_subcommands(capsys):
    parser = ArgumentParser()
    add_data_arguments(parser)
    assert parser.parse_args(['--val-share', '0.2']).val_fraction == 0.2
    command = ArgumentParser()
    command.add_subparsers().add_parser('draw').add_argument('--plot')
    assert command.parse_args(['draw', '--picture', 'a.png']).plot == 'a.png'
    assert capsys.readouterr().err.count('warning: ') == 2


def test_renamed_config_keys_work_with_a_warning(tmp_path, capsys):
    (tmp_path / 'c.py').write_text(f"_base_ = '{DEMO}'\nmax_bad_images = 3\n")
    config = load_config(str(tmp_path / 'c.py'), {})
    assert config.max_unreadable == 3 and 'max_bad_images' not in config
    assert capsys.readouterr().err.endswith(
        'c.py max_bad_images was renamed to max_unreadable; please use the new name\n'
    )
    for plus in ('', '+'):
        args = make_run_parser('').parse_args(['c.py', '--cfg-options', f'{plus}max_bad_images=4', 'a=1'])
        assert args.cfg_options == {f'{plus}max_unreadable': 4, 'a': 1}
        assert capsys.readouterr().err == (
            'warning: --cfg-options max_bad_images was renamed to max_unreadable; please use the new name\n'
        )
    assert load_config(str(DEMO), {'max_unreadable': 4}).max_unreadable == 4


def test_debug_environment_variable(run_tool):
    for env, has_traceback in (
        ({}, False),
        (dict(CONVNEXT_DENSE_DEBUG='0'), False),
        (dict(CONVNEXT_DENSE_DEBUG='1'), True),
    ):
        process = run_tool('complexity.py', 'nope.py', **env)
        assert process.returncode == 2 and ('Traceback' in process.stderr) == has_traceback
        assert process.stderr.splitlines()[-1].startswith("error: no config 'nope.py'")
    assert 'CONVNEXT_DENSE_DEBUG=1' in run_tool('complexity.py', '--help').stdout
