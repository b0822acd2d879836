"""The set-up behind `make`, without network: commands are recorded instead of run."""

import ast
import configparser
import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / 'tools/setup'))

import console  # noqa: E402
import environment  # noqa: E402
import mmcv_operators  # noqa: E402
from console import SetupError  # noqa: E402

LOCK = """\
# a comment
mmcv==2.1.0 \\
    --hash=sha256:aa
mmdet==3.3.0 \\
    --hash=sha256:bb
numpy==1.0 ; python_full_version < '3.11' \\
    --hash=sha256:cc \\
    --hash=sha256:dd
numpy==2.0 ; python_full_version >= '3.11' \\
    --hash=sha256:ee
opencv-python-headless==4.11.0.86 \\
    --hash=sha256:ff
uv==0.13.9 \\
    --hash=sha256:ff
"""


def interpreter(**fields) -> SimpleNamespace:
    defaults = dict(
        python='/env/bin/python',
        version=[3, 11, 7],
        headers='/include/python3.11',
        torch='2.11.0+cu130',
        overlock=None,
        has={'pip': True, 'cv2': True, 'mmcv': True},
    )
    return SimpleNamespace(**{**defaults, **fields})


def one_sentence(error) -> str:
    text = str(error.value)
    assert '\n' not in text
    return text


# --- Python and make


@pytest.mark.parametrize('version', [(3, 6, 15), (3, 9, 18), (3, 13, 0), (4, 0, 0)])
def test_unsupported_python_is_refused_with_a_remedy(version):
    for supported in ((3, 10, 0), (3, 11, 7), (3, 12, 99)):
        environment.check_python(supported, 'python3')
    with pytest.raises(SystemExit) as error:
        environment.check_python(version, '/usr/bin/python3')
    expected = ('3.10, 3.11 or 3.12', '.'.join(map(str, version)), '/usr/bin/python3', 'PYTHON=')
    assert all(part in one_sentence(error) for part in expected)


def test_an_old_python_can_read_the_script_as_far_as_its_refusal():
    ast.parse((ROOT / 'tools/setup/environment.py').read_text(), feature_version=(3, 7))


def make(*arguments: str, **variables: str) -> str:
    cleared = {'PYTHON', 'VENV', 'MAKEFLAGS', 'MFLAGS', 'MAKELEVEL', 'MAKEOVERRIDES', 'PYTEST_ARGS', 'DEMO_ARGS'}
    environ = {name: value for name, value in os.environ.items() if name not in cleared}
    command = ['make', '--no-print-directory', *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**environ, **variables}, check=True, capture_output=True, text=True
    ).stdout


def test_make_takes_the_next_supported_python_on_path_or_the_one_that_is_named(tmp_path):
    for name, status in (('python3', 1), ('python3.12', 127), ('python3.11', 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\nexit {status}\n')
        (tmp_path / name).chmod(0o755)
    path = f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'
    assert "python3.11 tools/setup/environment.py '.venv'" in make('-n', 'setup', PATH=path)
    assert "my tools/setup/environment.py '/env'" in make('-n', 'setup', PATH=path, PYTHON='my', VENV='/env')


def test_fast_and_slow_tests_part_the_suite():
    assert "'.venv/bin/python' -m pytest -m 'not slow' -k word" in make('-n', 'test', 'PYTEST_ARGS=-k word')
    assert "'.venv/bin/python' -m pytest -m slow -k word" in make('-n', 'test-slow', 'PYTEST_ARGS=-k word')


def test_make_alone_lists_every_target():
    targets = set(re.search(r'^\.PHONY: (.*)', (ROOT / 'Makefile').read_text(), re.M)[1].split()) - {'help'}
    assert {'setup', 'lock', 'demo', 'lint', 'test', 'test-slow', 'clean'} <= targets
    listed = make()
    assert all(re.search(rf'make {target} ', listed) for target in targets)


# --- requirements


def test_no_requirement_or_configuration_names_an_index_or_a_path():
    files = [*ROOT.glob('requirements/*'), *(ROOT / name for name in ('setup.cfg', 'pyproject.toml', 'Makefile'))]
    assert len(files) == 7
    for path in files:
        assert not re.search(r'://|index-url [^-]|find-links [^-]| @ |/opt', path.read_text()), path


def test_lock_pins_and_hashes_every_package_of_its_inputs():
    lock = (ROOT / 'requirements/lock.txt').read_text()
    entries = re.findall(r'^([\w.-]+)==\S+( ; .*)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)', lock, re.M)
    assert len(entries) == len(re.findall(r'^[^\s#]', lock, re.M)) > 100
    inputs = ''.join((ROOT / f'requirements/{name}').read_text() for name in ('runtime.txt', 'dev.txt', 'lock.in'))
    named = {name.lower() for name in re.findall(r'^[A-Za-z][\w.-]*', inputs, re.M)}
    assert len(named) > 30
    assert named <= {name for name, *_ in entries}
    for line in re.findall(r'^\S+==\S+$', inputs, re.M):
        assert re.search(rf'^{re.escape(line)} ', lock, re.M), line
    assert 'opencv-python==' not in lock


def test_package_requires_no_torch_and_no_extra_brings_mmcv():
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'setup.cfg')
    extras = dict(parser['options.extras_require'])
    assert set(extras) == {'det', 'seg', 'timm', 'imagenet', 'natten', 'dev'}
    assert parser['options']['install_requires'] == ''
    required = [line.strip() for text in extras.values() for line in text.split('\n')]
    assert not [line for line in required if line.startswith(('torch', 'mmcv'))]


# --- the set-up as a whole


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / 'checkout'
    files = ('setup.cfg', 'pyproject.toml', 'tools/setup/environment.py', 'overlock/__init__.py', 'overlock/ops/x.cpp')
    for name in (*files, 'requirements/lock.txt', 'requirements/runtime.txt'):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(LOCK if name.endswith('lock.txt') else name)
    (root / '.venv').mkdir()
    return root


@pytest.fixture
def machine(monkeypatch):
    """Record commands; `found` is what a probe finds, and `fails` the word whose command fails."""
    state = SimpleNamespace(found=interpreter(), commands=[], fails=None, pins=[])

    def run(command, log, variables=None):
        state.commands.append(command)
        state.pins += [Path(word).read_text() for word in command if word.endswith('pins.txt')]
        if state.fails in command:
            raise SetupError('stopped')
        return 'note: on the CPU only\n' if command[-1].endswith('pins.txt') and 'mmcv_operators' in command[1] else ''

    monkeypatch.setattr(environment, 'run', run)
    monkeypatch.setattr(environment, 'probe', lambda python: state.found)
    monkeypatch.setattr(environment.signal, 'signal', lambda *_: None)
    return state


def test_interrupted_set_up_is_continued_and_only_then_stamped(checkout, machine, capsys):
    venv = checkout / '.venv'
    machine.fails = '--no-build-isolation'
    with pytest.raises(SetupError):
        environment.set_up(venv, checkout, {})
    assert not environment.is_set_up(venv, checkout, {})
    machine.fails = None
    machine.commands.clear()
    environment.set_up(venv, checkout, {})
    assert environment.is_set_up(venv, checkout, {})
    uv, packages, mmcv, package, operators = machine.commands
    assert uv[2:4] == ['pip', 'install'] and packages[2:5] == ['uv', 'pip', 'install']
    assert {'--require-hashes', '--no-deps'} <= set(uv) & set(packages)
    assert mmcv[1] == str(checkout / 'tools/setup/mmcv_operators.py')
    assert package[-2:] == ['-e', str(checkout)] and operators[-2:] == ['-m', 'overlock.ops.build']
    assert 'note: on the CPU only' in capsys.readouterr().out


def test_tested_set_is_the_lock_but_for_mmcv_which_is_built_by_its_hash(checkout, machine):
    environment.set_up(checkout / '.venv', checkout, {})
    uv, packages, mmcv = machine.pins
    assert uv == LOCK[LOCK.index('uv==') :]
    assert packages == LOCK[LOCK.index('mmdet') :]
    assert mmcv == 'mmcv==2.1.0 \\\n    --hash=sha256:aa\n'


def test_set_up_goes_on_without_the_optional_operators(checkout, machine, capsys):
    machine.fails = 'overlock.ops.build'
    environment.set_up(checkout / '.venv', checkout, {})
    assert environment.is_set_up(checkout / '.venv', checkout, {})
    assert 'optional operators for this CPU could not be compiled' in capsys.readouterr().out


@pytest.mark.parametrize('has_cv2', [False, True])
def test_environment_of_the_user_keeps_its_torch_and_opencv(checkout, machine, tmp_path, has_cv2):
    machine.found = interpreter(torch='2.13.0+cpu', has={'pip': True, 'cv2': has_cv2, 'mmcv': True})
    (tmp_path / 'env').mkdir()
    environment.set_up(tmp_path / 'env', checkout, {})
    libraries, openmmlab = machine.commands[:2]
    assert 'torch==2.13.0' in libraries and str(checkout / 'requirements/runtime.txt') in libraries
    names = re.findall('^[a-z-]+', machine.pins[0], re.M)
    assert '--no-deps' in openmmlab and names == ['mmdet'] + ['opencv-python-headless'] * (not has_cv2)


def test_environment_without_torch_gets_the_tested_set_and_keeps_getting_it(checkout, machine, tmp_path):
    (tmp_path / 'env').mkdir()
    machine.found = interpreter(torch=None)
    environment.set_up(tmp_path / 'env', checkout, {})
    machine.found = interpreter()
    environment.set_up(tmp_path / 'env', checkout, {})
    assert [command[2] for command in machine.commands].count('uv') == 2


@pytest.mark.parametrize(('home', 'installs'), [('own', True), (None, True), ('file:///other/checkout', False)])
def test_package_from_elsewhere_stays_installed(checkout, machine, home, installs, capsys):
    machine.found = interpreter(overlock=checkout.as_uri() if home == 'own' else home)
    environment.set_up(checkout / '.venv', checkout, {})
    assert any('-e' in command for command in machine.commands) == installs
    assert ('/other/checkout stays installed' in capsys.readouterr().out) != installs


@pytest.fixture
def elsewhere(tmp_path):
    """A Python whose environment has this package, editable, from another checkout."""
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'env'], check=True)
    (tmp_path / 'other/overlock').mkdir(parents=True)
    (tmp_path / 'other/overlock/__init__.py').write_text('')
    site = next((tmp_path / 'env').glob('lib/python*/site-packages'))
    (site / 'overlock.pth').write_text(f'{tmp_path}/other\n')
    (site / 'overlock-1.dist-info').mkdir()
    (site / 'overlock-1.dist-info/METADATA').write_text('Metadata-Version: 2.1\nName: overlock\nVersion: 1\n')
    url = (tmp_path / 'other').as_uri()
    (site / 'overlock-1.dist-info/direct_url.json').write_text(f'{{"dir_info": {{"editable": true}}, "url": "{url}"}}')
    return tmp_path / 'env/bin/python', tmp_path / 'other'


def test_package_from_elsewhere_is_found_by_the_probe(elsewhere):
    python, other = elsewhere
    found = environment.probe(python)
    assert found.overlock == other.as_uri()
    assert found.torch is None and found.has == {'pip': False, 'cv2': False, 'mmcv': False}


def test_make_runs_the_code_of_this_checkout_in_an_environment_that_has_another(elsewhere):
    python, other = elsewhere
    tell = 'import importlib.util; print(importlib.util.find_spec("overlock").origin)'
    command = make('-n', 'demo', VENV=str(python.parents[1])).splitlines()[-1].replace('tools/demo.py', f"-c '{tell}'")
    for prefix, home in ((f"'{python}' -c '{tell}'", other), (command, ROOT)):
        printed = subprocess.check_output(prefix, shell=True, cwd='/', env={'PATH': os.environ['PATH']}, text=True)
        assert printed.strip() == str(home / 'overlock/__init__.py')


# --- the stamp


@pytest.mark.parametrize(
    'change',
    [
        *(
            'requirements/runtime.txt',
            'setup.cfg',
            'pyproject.toml',
            'tools/setup/environment.py',
            'overlock/ops/x.cpp',
        ),
        *('mmdet_overlock/__init__.py', '.venv/overlock-stamp'),
        *(dict(torch='2.12.0+cpu'), dict(torch=None), dict(version=[3, 11, 8]), {'FORCE_CUDA': '1'}),
    ],
)
def test_what_changed_calls_for_a_set_up(checkout, machine, change):
    environment.set_up(checkout / '.venv', checkout, {})
    assert environment.is_set_up(checkout / '.venv', checkout, {})
    environ = change if 'FORCE_CUDA' in change else {}
    if isinstance(change, str):
        (checkout / change).parent.mkdir(exist_ok=True)
        (checkout / change).write_text('changed')
    elif not environ:
        machine.found = interpreter(**change)
    assert not environment.is_set_up(checkout / '.venv', checkout, environ)


def test_second_run_installs_nothing(machine, tmp_path, capsys):
    environment.main(tmp_path / 'env')
    count = len(machine.commands)
    environment.main(tmp_path / 'env')
    assert len(machine.commands) == count > 0
    assert capsys.readouterr().out.count('is set up') == 2


def test_two_set_ups_wait_for_each_other(machine, monkeypatch, tmp_path):
    running, most = [], []

    def set_up(venv, root, environ):
        running.append(venv)
        most.append(len(running))
        time.sleep(0.2)
        running.pop()

    monkeypatch.setattr(environment, 'set_up', set_up)
    threads = [threading.Thread(target=environment.main, args=(tmp_path,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1]


@pytest.mark.parametrize(('failure', 'words'), [(SetupError('no'), 'setup: no'), (KeyboardInterrupt(), 'continues')])
def test_script_stops_with_the_message_of_a_failure(machine, monkeypatch, tmp_path, failure, words):
    monkeypatch.setattr(environment, 'set_up', lambda *_: (_ for _ in ()).throw(failure))
    with pytest.raises(SystemExit, match=words):
        environment.main(tmp_path)


# --- the environment


def test_probe_tells_the_torch_of_an_environment_without_importing_it():
    found = environment.probe(sys.executable)
    assert found.torch == torch.__version__ and tuple(found.version) == sys.version_info[:3]
    assert 'import torch' not in environment.PROBE


def test_half_made_own_environment_is_made_anew(tmp_path):
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/python').symlink_to(tmp_path / 'gone')
    (tmp_path / 'log').write_text('')
    found = environment.create(tmp_path, True, tmp_path / 'log')
    assert tuple(found.version) == sys.version_info[:3] and Path(found.python).parent == tmp_path / 'bin'
    assert found.has['pip']


def test_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / 'thesis.txt').write_text('mine')
    with pytest.raises(SetupError, match='VENV=') as error:
        environment.create(tmp_path, False, tmp_path / 'log')
    one_sentence(error)
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.txt']


def test_pip_is_brought_where_it_is_missing_and_an_unsupported_python_is_refused(machine, tmp_path):
    machine.found = interpreter(has={'pip': False})
    environment.create(tmp_path, False, tmp_path / 'log')
    assert machine.commands == [['/env/bin/python', '-m', 'ensurepip']]
    machine.found = interpreter(version=[3, 13, 0])
    with pytest.raises(SystemExit, match=r'3\.13\.0'):
        environment.create(tmp_path, False, tmp_path / 'log')


def test_torch_of_the_user_is_kept_from_2_6_on_and_refused_before(machine, tmp_path):
    for version in ('2.6.0', '2.10.1+cu128', '3.0'):
        machine.found = interpreter(torch=version)
        assert environment.create(tmp_path, False, tmp_path / 'log').torch == version
    machine.found = interpreter(torch='2.5.1+cu121')
    with pytest.raises(SetupError, match=r'torch >= 2\.6 is needed, got 2\.5\.1\+cu121 .*: upgrade') as error:
        environment.create(tmp_path, False, tmp_path / 'log')
    one_sentence(error)
    assert machine.commands == []


def test_missing_compiler_or_headers_stop_the_set_up_before_anything_is_installed(checkout, machine, monkeypatch):
    machine.found = interpreter(has={'pip': True, 'cv2': True, 'mmcv': False})
    with pytest.raises(
        SetupError, match=r'nowhere-c\+\+ and /include/python3.11/Python.h was not found.*3\.11-dev'
    ) as error:
        environment.set_up(checkout / '.venv', checkout, {'CC': 'sh -x', 'CXX': 'nowhere-c++'})
    one_sentence(error)
    assert machine.commands == []


# --- mmcv's operators


@pytest.fixture
def cuda(tmp_path, monkeypatch):
    """A machine with one GPU (9.0), torch of CUDA 13.0 with headers of its own, and nvcc 13.0."""
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/nvcc').write_text('#!/bin/sh\necho "Cuda compilation tools, release 13.0, V13.0.88"\n')
    (tmp_path / 'bin/nvcc').chmod(0o755)
    (tmp_path / 'nvidia/cu13/include').mkdir(parents=True)
    monkeypatch.setattr(mmcv_operators.cpp_extension, 'CUDA_HOME', str(tmp_path))
    monkeypatch.setattr(torch, '__path__', [str(tmp_path / 'torch')])
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: (9, 0))
    return tmp_path


def test_target_is_cuda_for_visible_or_named_gpus_and_else_the_cpu(cuda, monkeypatch):
    key, variables = mmcv_operators.choose_target({'CPATH': '/mine', 'MAX_JOBS': '3'})
    assert key == 'cu13.0-sm90' and variables['CPATH'] == f'{cuda}/nvidia/cu13/include:/mine'
    assert (variables['FORCE_CUDA'], variables['MAX_JOBS'], variables['CUDA_HOME']) == ('1', '3', str(cuda))
    key, variables = mmcv_operators.choose_target({'FORCE_CUDA': '0'})
    assert (key, variables['FORCE_CUDA'], variables['CUDA_VISIBLE_DEVICES']) == ('cpu', '0', '')
    assert variables['MMCV_WITH_OPS'] == '1' and int(variables['MAX_JOBS']) >= 1
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    environ = {'FORCE_CUDA': '1', 'TORCH_CUDA_ARCH_LIST': '8.0;9.0+PTX'}
    assert mmcv_operators.choose_target(environ)[0] == 'cu13.0-sm80_90+PTX'
    assert mmcv_operators.choose_target({})[0] == 'cpu'


@pytest.mark.parametrize('forced', [False, True])
@pytest.mark.parametrize(
    ('part', 'value', 'reason'),
    [('torch', None, 'CUDA none'), ('torch', '12.4', 'CUDA 12.4'), ('nvcc', None, 'not there')],
)
def test_cuda_that_cannot_be_compiled_is_noted_or_refused(cuda, monkeypatch, capsys, forced, part, value, reason):
    owner = (torch.version, 'cuda') if part == 'torch' else (mmcv_operators.cpp_extension, 'CUDA_HOME')
    monkeypatch.setattr(*owner, value)
    if forced:
        with pytest.raises(SystemExit, match=reason):
            mmcv_operators.choose_target({'FORCE_CUDA': '1'})
    else:
        assert mmcv_operators.choose_target({})[0] == 'cpu'
        assert re.match(f'note: .*{reason}', capsys.readouterr().out)


BUILD = ['wheel', 'install', 'prove']


@pytest.mark.parametrize(
    ('kept', 'outcomes', 'commands'),
    [
        ('', [True], ['prove']),
        ('', [False, True, True, True], ['prove', *BUILD]),
        ('', [False, False], ['prove', 'wheel']),
        ('', [False, True, True, False], ['prove', *BUILD]),
        ('old', [False, True, True], ['prove', 'install', 'prove']),
        ('old', [False, False, True, True, True], ['prove', 'install', *BUILD]),
        ('old', [False, True, False, True, True, True], ['prove', 'install', 'prove', *BUILD]),
    ],
    ids=['works', 'new', 'no compilation', 'no proof', 'kept', 'kept but damaged', 'kept but wrong'],
)
def test_mmcv_is_kept_or_taken_from_a_kept_wheel_or_compiled_and_kept(tmp_path, monkeypatch, kept, outcomes, commands):
    tag = 'cp{}{}-{}'.format(*sys.version_info[:2], mmcv_operators.sysconfig.get_platform())
    wheel = tmp_path / f'wheels/mmcv2.1.0-torch{torch.__version__}-cpu-{tag}/mmcv.whl'
    (tmp_path / 'pin').write_text('mmcv==2.1.0 \\\n    --hash=sha256:aa\n')
    if kept:
        wheel.parent.mkdir(parents=True)
        wheel.write_text(kept)
    seen, results = [], iter(outcomes)

    def succeeds(command, variables=None):
        if 'c++-header' in command:
            return True
        seen.append('prove' if command[1] == '-c' else command[3])
        if command[3] == 'wheel':
            Path(command[-1], 'mmcv.whl').write_text('new')
            assert {'--no-cache-dir', '--no-build-isolation', '--no-deps', '--require-hashes'} <= set(command)
            assert command[command.index('--no-binary') + 1] == 'mmcv'
            assert re.search(r'-g0 -include \S+/torch\.h$', variables['CPPFLAGS'])
        return next(results)

    monkeypatch.setattr(mmcv_operators, 'succeeds', succeeds)
    with contextlib.nullcontext() if outcomes[-1] else pytest.raises(SystemExit, match='mmcv'):
        mmcv_operators.set_up(tmp_path / 'pin', {'OVERLOCK_CACHE': str(tmp_path), 'FORCE_CUDA': '0'})
    assert seen == commands
    built = BUILD[:2] == [word for word in commands if word in BUILD[:2]][-2:]
    assert [path.read_text() for path in wheel.parent.glob('*')] == (['new'] if built else [kept] if kept else [])


@pytest.mark.slow
def test_header_is_precompiled_for_the_flags_of_mmcv(tmp_path):
    assert mmcv_operators.precompile(tmp_path) == f'-include {tmp_path}/torch.h'
    assert (tmp_path / 'torch.h.gch').stat().st_size > 2**20


@pytest.mark.slow
@pytest.mark.parametrize(('version', 'right'), [('2.1.0', True), ('2.0.0', False)])
def test_proof_calls_the_operators_of_this_environment(version, right):
    pytest.importorskip('mmcv')
    assert mmcv_operators.succeeds([sys.executable, '-c', mmcv_operators.PROOF, version, 'cpu']) == right


# --- what the user sees


def test_compilation_is_told_in_files_and_time():
    output = '  [1/77] c++ -c x.cpp\n  warning: [3/4]\n  [11/77] c++ -c y.cpp\n'
    assert console.progress(output, 65) == '11 of 77 files compiled, 0:01:05 elapsed'
    assert console.progress('Collecting torch\n', 5) == '0:00:05 elapsed'


def test_excerpt_shows_the_first_errors_and_the_last_lines():
    noise = [f'c++ -c file{index}.cpp' for index in range(50)]
    shown = console.excerpt('\n'.join(['x.cpp:3: fatal error: cusparse.h: No such file', *noise, 'ninja failed']))
    assert 'cusparse.h' in shown and 'ninja failed' in shown and 'file49.cpp' in shown
    assert 'file0.cpp' not in shown and len(shown.splitlines()) == 12


@pytest.fixture
def log(tmp_path):
    (tmp_path / 'log').write_text('before\n')
    return tmp_path / 'log'


def test_output_of_a_command_goes_to_the_log_alone(log, capfd):
    assert console.run(['sh', '-c', 'echo given $GIVEN'], log, {'GIVEN': 'variable'}) == 'given variable\n'
    assert log.read_text() == 'before\ngiven variable\n'
    assert capfd.readouterr() == ('', '')


def test_failed_command_is_told_with_status_last_lines_and_log(log):
    with pytest.raises(SetupError, match=rf'(?s)status 3:\n    No space.*{log}'):
        console.run(['sh', '-c', 'echo No space left on device; exit 3'], log)


@pytest.mark.parametrize('terminal', [False, True])
def test_progress_is_lines_or_one_line_rewritten_on_a_terminal(log, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal, raising=False)
    console.run(['sh', '-c', 'echo "[3/6] c++"; sleep 1.2'], log, every=0.5)
    shown = capsys.readouterr().out
    assert '3 of 6 files' in shown
    assert ('\n' not in shown and shown.endswith('\r\x1b[K')) if terminal else '\r' not in shown


def test_interruption_ends_the_command_and_its_children(log, tmp_path, monkeypatch):
    def interrupt(output, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(console, 'progress', interrupt)
    with pytest.raises(KeyboardInterrupt):
        console.run(
            ['sh', '-c', f'(touch {tmp_path}/started; sleep 2; touch {tmp_path}/outlived) & wait'], log, every=1
        )
    assert (tmp_path / 'started').exists()
    time.sleep(2)
    assert not (tmp_path / 'outlived').exists()
