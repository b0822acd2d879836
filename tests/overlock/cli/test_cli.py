"""The command `overlock`."""

import ast
import re
import subprocess
import sys

import pytest
from mmengine.config import Config

from overlock.cli import COMMANDS, main
from overlock.cli.configs import copy_config, table
from overlock.utils.configs import CONFIGS, config_names, find_config
from overlock.utils.errors import UserError
from tests.testing import ROOT

# Scripts that are no subcommands.
OTHER_TOOLS = {'demo', 'dist_run', 'imagenet_demo', 'update_docs'}


@pytest.mark.parametrize(
    ('arguments', 'code', 'said'),
    [
        ([], 0, 'reparameterize'),
        (['--version'], 0, '0.'),
        *(([command, '--help'], 0, f'usage: overlock {command}') for command in COMMANDS),
        (['configs'], 0, 'cascade_overlock_s_3x'),
        (['trian'], 2, "invalid choice: 'trian'"),
        (['train', 'cascade_overlok_s_3x'], 2, 'did you mean cascade_overlock_s_3x'),
        (['complexity', 'a.py', '--size', '1'], 2, 'expected 2 arguments'),
    ],
)
def test_answers_without_torch(arguments, code, said):
    script = (
        'import sys\nfrom overlock.cli import main\ntry:\n    code = main(sys.argv[1:])\n'
        'except SystemExit as end:\n    code = end.code\nassert "torch" not in sys.modules\nsys.exit(code)'
    )
    result = subprocess.run([sys.executable, '-c', script, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == code, result.stderr
    assert said in result.stdout + result.stderr
    assert 'Traceback' not in result.stderr


def test_each_tool_is_the_twin_of_a_command():
    commands = {}
    for path in (ROOT / 'tools').glob('*.py'):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = [node.args[0].value for node in calls if getattr(node.func, 'id', '') == 'run_command']
        commands[path.stem] = names
    assert {name for name, found in commands.items() if not found} == OTHER_TOOLS
    assert sorted(sum(commands.values(), [])) == sorted({*COMMANDS} - {'configs', 'data', 'doctor'})


def test_lists_every_configuration_with_its_results():
    lines = {line.split()[0]: line for line in table().splitlines()[1:]}
    assert lines.keys() == config_names().keys()
    assert lines['mask_rcnn_overlock_s_1x'].endswith('74.9 M      box AP 49.4, mask AP 44.0')
    # Those too that have no published weights.
    assert all(re.search(r' \d+\.\d M ', line) for line in lines.values())
    assert lines['cascade_overlock_s_3x'].split()[-4:-1] == lines['cascade_overlock_s_1x'].split()[-4:-1]


@pytest.mark.parametrize('name', ['cascade_moganet_b_3x', 'upernet_overlock_xt_overfit'])
def test_copies_a_configuration_that_parses_alike(name, tmp_path, capsys):
    assert main(['configs', name, '--copy', str(tmp_path)]) == 0
    copy = capsys.readouterr().out.strip()
    original = Config.fromfile(find_config(name), import_custom_modules=False)
    assert Config.fromfile(copy, import_custom_modules=False).to_dict() == original.to_dict()


def test_a_copy_overwrites_no_edited_file(tmp_path):
    copy = copy_config('upernet_overlock_s_160k', tmp_path)
    copy_config('upernet_overlock_t_160k', tmp_path)
    copy.write_text('edited')
    with pytest.raises(UserError, match='upernet_overlock_s_160k.py would be overwritten'):
        copy_config('upernet_overlock_s_160k', tmp_path)
    assert copy.read_text() == 'edited'


def test_a_path_comes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = 'upernet_overlock_s_160k'
    assert find_config(name) == find_config(f'{name}.py') == CONFIGS / f'{name}.py'
    (tmp_path / f'{name}.py').touch()
    assert find_config(f'{name}.py').resolve() == tmp_path / f'{name}.py'
    with pytest.raises(UserError, match='does not exist'):
        find_config(f'elsewhere/{name}.py')
