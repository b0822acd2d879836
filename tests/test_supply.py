"""No code of a file, a string or the network is run: `make lint` holds that, and these tests hold `make lint`."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.testing import ROOT

RUFF = [sys.executable, '-m', 'ruff', 'check', '--no-cache', '--output-format', 'json']
# By what they call; the rules that pyproject.toml selects.
FORBIDDEN = {
    'eval("1")': 'S307',
    'exec("1")': 'S102',
    'import subprocess\nsubprocess.run("ls", shell=True)': 'S602',
    'import os\nos.system("ls " + a)': 'S605',
    'import yaml\nyaml.load(a, yaml.Loader)': 'S506',
    'import yaml\nyaml.unsafe_load(a)': 'TID251',
    'import pickle\npickle.load(a)': 'S301',
    'import pickle\npickle.loads(a)': 'S301',
    'import marshal\nmarshal.loads(a)': 'S302',
    'import tarfile\ntarfile.open(a).extractall()': 'S202',
    'from pickle import Unpickler': 'TID251',
    'import torch\ntorch.load(a)': 'TID251',
    'import torch\ntorch.load(a, weights_only=True)': 'TID251',
    'from torch import load': 'TID251',
    'import torch\ntorch.hub.load(a, b)': 'TID251',
    'import numpy as np\nnp.load(a, allow_pickle=True)': 'TID251',
}
RULES = ','.join(sorted(set(FORBIDDEN.values()) | {'S323', 'S501', 'S604', 'S609'}))


def ruff(*options: str, source: str | None = None) -> list[dict]:
    process = subprocess.run([*RUFF, *options], input=source, capture_output=True, text=True, cwd=ROOT)
    return json.loads(process.stdout)


@pytest.mark.parametrize('folder', ['overlock/utils', 'mmengine_overlock', 'tools', 'demo', 'configs'])
def test_lint_refuses_what_runs_code_of_files_and_strings(folder):
    source = ''.join(f'{lines}\n' for lines in FORBIDDEN)
    found = ruff('--stdin-filename', f'{folder}/new.py', '-', source=source)
    codes = {(item['location']['row'], item['code']) for item in found}
    row = 0
    for lines, code in FORBIDDEN.items():
        row += lines.count('\n') + 1
        assert (row, code) in codes, lines


def test_only_the_reader_of_weight_files_and_tests_are_excepted():
    everywhere = ruff('.', '--ignore-noqa', '--select', RULES, '--config', 'lint.per-file-ignores = {}')
    names = {item['filename'].removeprefix(f'{ROOT}/') for item in everywhere}
    assert {name for name in names if not name.startswith('tests/')} == {'overlock/checkpoint/unpickling.py'}


def test_every_shell_script_is_linted_and_evaluates_nothing():
    linted = re.search(r'shellcheck. (.*)', (ROOT / 'Makefile').read_text())[1].split()
    scripts = {path for pattern in linted for path in ROOT.glob(pattern)}
    tracked = subprocess.check_output(['git', 'grep', '-lE', '^#!.*sh$'], cwd=ROOT, text=True).split()
    assert scripts >= {ROOT / name for name in tracked} and len(tracked) >= 5
    assert not [path for path in scripts if re.search(r'(^|[;&|\s])(eval|source)\s', path.read_text())]


def test_an_audit_reads_the_lock_in_an_environment_of_its_own():
    # These tests may run inside of make.
    given = {name: value for name, value in os.environ.items() if not name.startswith(('MAKE', 'MFLAGS'))}
    command = ['make', '-n', 'audit', 'PYTHON=py', 'AUDIT_ARGS=-s osv']
    commands = subprocess.check_output(command, cwd=ROOT, text=True, env=given)
    environment, install, audit = commands.splitlines()
    assert environment == 'py -m venv build/audit'
    assert re.fullmatch(r'build/audit/bin/python -m pip install --quiet pip-audit==[\d.]+', install)
    # Strict: a package that the service does not know is no clean one.
    assert audit == 'build/audit/bin/pip-audit --requirement requirements/lock.txt --disable-pip --strict -s osv'
