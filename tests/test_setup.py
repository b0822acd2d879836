"""The set-up behind `make`, without network: commands are recorded instead of run."""

import ast
import configparser
import contextlib
import fcntl
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

LOCK = (ROOT / 'requirements/lock.txt').read_text()
HAS_ALL = {'pip': True, 'cv2': True, 'mmcv': True}
FOUND = dict(
    python='/env/bin/python',
    version=[3, 11, 7],
    headers='/include/python3.11',
    torch='2.11.0+cu130',
    overlock=None,
    has=HAS_ALL,
)


def names(requirements: str) -> list[str]:
    return re.findall(r'^([\w.-]+)==', requirements, re.M)


@contextlib.contextmanager
def refused(message, error=SetupError):
    """Expect one sentence."""
    with pytest.raises(error, match=message) as caught:
        yield
    assert '\n' not in str(caught.value)


# --- Python and make


@pytest.mark.parametrize('version', [(3, 6, 15), (3, 9, 18), (3, 13, 0), (4, 0, 0)])
def test_unsupported_python_is_refused_with_a_remedy(version):
    for supported in ((3, 10, 0), (3, 11, 7), (3, 12, 99)):
        environment.check_python(supported, 'python3')
    found = r'\.'.join(map(str, version))
    with refused(rf'3\.10, 3\.11 or 3\.12 is needed, got {found} \(/usr/bin/python3\).*PYTHON=', SystemExit):
        environment.check_python(version, '/usr/bin/python3')


def test_an_old_python_can_read_the_script_as_far_as_its_refusal():
    ast.parse((ROOT / 'tools/setup/environment.py').read_text(), feature_version=(3, 7))


def make(*arguments: str, **variables: str) -> str:
    cleared = {'PYTHON', 'VENV', 'MAKEFLAGS', 'MFLAGS', 'MAKELEVEL', 'MAKEOVERRIDES', 'PYTEST_ARGS', 'DEMO_ARGS'}
    environ = {**{name: value for name, value in os.environ.items() if name not in cleared}, **variables}
    return subprocess.check_output(['make', '--no-print-directory', *arguments], cwd=ROOT, env=environ, text=True)


@pytest.mark.parametrize(
    ('arguments', 'command'),
    [
        (['setup'], "python3.11 tools/setup/environment.py '.venv'"),
        (['setup', 'PYTHON=my', 'VENV=/env'], "my tools/setup/environment.py '/env'"),
        (['test', 'PYTEST_ARGS=-k word'], "'.venv/bin/python' -m pytest -m 'not slow' -k word"),
        (['test-slow', 'PYTEST_ARGS=-k word'], "'.venv/bin/python' -m pytest -m slow -k word"),
    ],
)
def test_make_takes_the_next_supported_python_and_what_is_named(tmp_path, arguments, command):
    for name, status in (('python3', 1), ('python3.12', 127), ('python3.11', 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\nexit {status}\n')
        (tmp_path / name).chmod(0o755)
    assert command in make('-n', *arguments, PATH=f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')


def test_make_alone_lists_every_target():
    targets = set(re.search(r'^\.PHONY: (.*)', (ROOT / 'Makefile').read_text(), re.M)[1].split()) - {'help'}
    assert {'setup', 'lock', 'demo', 'lint', 'test', 'test-slow', 'clean'} <= targets
    assert targets <= set(re.findall(r'make (\S+) ', make()))


# --- requirements


def test_no_requirement_or_configuration_names_an_index_or_a_path():
    files = [*ROOT.glob('requirements/*'), *(ROOT / name for name in ('setup.cfg', 'pyproject.toml', 'Makefile'))]
    assert len(files) == 7
    for path in files:
        assert not re.search(r'://|index-url [^-]|find-links [^-]| @ |/opt', path.read_text()), path


def test_lock_pins_and_hashes_every_package_of_its_inputs():
    entries = re.findall(r'^([\w.-]+)==\S+( ; .*)? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)', LOCK, re.M)
    assert len(entries) == len(re.findall(r'^[^\s#]', LOCK, re.M)) > 100
    inputs = ''.join((ROOT / f'requirements/{name}').read_text() for name in ('runtime.txt', 'dev.txt', 'lock.in'))
    named = {name.lower() for name in re.findall(r'^[A-Za-z][\w.-]*', inputs, re.M)}
    assert len(named) > 30
    assert named <= {name for name, *_ in entries}
    assert all(f'\n{line} ' in LOCK for line in re.findall(r'^\S+==\S+$', inputs, re.M))
    assert 'opencv-python==' not in LOCK


def test_package_requires_no_torch_and_no_extra_brings_mmcv():
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'setup.cfg')
    extras = parser['options.extras_require']
    assert set(extras) == {'det', 'seg', 'timm', 'imagenet', 'natten', 'predict', 'export', 'dev'}
    assert parser['options']['install_requires'] == ''
    assert not [line for text in extras.values() for line in text.split() if line.startswith(('torch', 'mmcv'))]


# --- the set-up as a whole


@pytest.fixture
def setup(tmp_path, monkeypatch):
    """A checkout whose commands are recorded; `found` is what a probe finds, `fails` the word whose command fails."""

    def run(command, log, variables=None):
        state.commands.append(command)
        state.pins += [Path(word).read_text() for word in command if word.endswith('pins.txt')]
        if state.fails in command:
            raise SetupError('stopped')
        return 'note: on the CPU only\n' if 'mmcv_operators' in command[1] else ''

    def start(venv=None):
        environment.set_up(venv or state.venv, root, {})

    def is_set_up(**environ):
        return environment.is_set_up(state.venv, root, environ)

    def find(**fields):
        state.found = SimpleNamespace(**{**FOUND, **fields})

    root = tmp_path / 'checkout'
    state = SimpleNamespace(
        root=root, venv=root / '.venv', commands=[], pins=[], fails=None, start=start, is_set_up=is_set_up, find=find
    )
    files = ('setup.cfg', 'pyproject.toml', 'tools/setup/environment.py', 'overlock/__init__.py', 'overlock/ops/x.cpp')
    for name in (*files, 'requirements/lock.txt', 'requirements/runtime.txt'):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(LOCK if name.endswith('lock.txt') else name)
    for folder in (root / '.venv', tmp_path / 'env'):
        folder.mkdir()
    find()
    monkeypatch.setattr(environment, 'run', run)
    monkeypatch.setattr(environment, 'probe', lambda python: state.found)
    monkeypatch.setattr(environment.signal, 'signal', lambda *_: None)
    return state


def test_interrupted_set_up_is_continued_and_only_then_stamped_and_takes_the_tested_set(setup, capsys):
    setup.fails = '--no-build-isolation'
    with pytest.raises(SetupError):
        setup.start()
    assert not setup.is_set_up()
    setup.fails, setup.commands, setup.pins = None, [], []
    setup.start()
    assert setup.is_set_up()
    uv, packages, mmcv, package, operators = setup.commands
    assert uv[2:4] == ['pip', 'install'] and packages[2:5] == ['uv', 'pip', 'install']
    assert {'--require-hashes', '--no-deps'} <= set(uv) & set(packages)
    assert mmcv[1] == str(setup.root / 'tools/setup/mmcv_operators.py')
    assert package[-2:] == ['-e', str(setup.root)] and operators[-2:] == ['-m', 'overlock.ops.build']
    # The lock but for mmcv, which is built by its hash.
    pins = setup.pins
    assert (names(pins[0]), names(pins[2])) == (['uv'], ['mmcv'])
    assert names(pins[1]) == [name for name in names(LOCK) if name != 'mmcv']
    assert pins[1].count('--hash') == LOCK.count('--hash') - pins[2].count('--hash') < LOCK.count('--hash')
    assert 'note: on the CPU only' in capsys.readouterr().out


def test_set_up_goes_on_without_the_optional_operators(setup, capsys):
    setup.fails = 'overlock.ops.build'
    setup.start()
    assert setup.is_set_up()
    assert 'optional operators for this CPU could not be compiled' in capsys.readouterr().out


@pytest.mark.parametrize('has_cv2', [False, True])
def test_environment_of_the_user_keeps_its_torch_and_opencv(setup, tmp_path, has_cv2):
    setup.find(torch='2.13.0+cpu', has={**HAS_ALL, 'cv2': has_cv2})
    setup.start(tmp_path / 'env')
    libraries, openmmlab = setup.commands[:2]
    assert 'torch==2.13.0' in libraries and str(setup.root / 'requirements/runtime.txt') in libraries
    openmmlab_names = {'mmdet', 'mmengine', 'mmsegmentation', *(() if has_cv2 else ['opencv-python-headless'])}
    assert '--no-deps' in openmmlab and set(names(setup.pins[0])) == openmmlab_names


def test_environment_without_torch_gets_the_tested_set_and_keeps_getting_it(setup, tmp_path):
    for torch_version in (None, '2.11.0+cu130'):
        setup.find(torch=torch_version)
        setup.start(tmp_path / 'env')
    assert [command[2] for command in setup.commands].count('uv') == 2


@pytest.mark.parametrize(('home', 'installs'), [('own', True), (None, True), ('file:///other/checkout', False)])
def test_package_from_elsewhere_stays_installed(setup, home, installs, capsys):
    setup.find(overlock=setup.root.as_uri() if home == 'own' else home)
    setup.start()
    assert any('-e' in command for command in setup.commands) == installs
    assert ('/other/checkout stays installed' in capsys.readouterr().out) != installs


def test_package_from_elsewhere_is_found_but_make_runs_the_code_of_this_checkout(tmp_path):
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'env'], check=True)
    python, other = tmp_path / 'env/bin/python', tmp_path / 'other'
    site = next((tmp_path / 'env').glob('lib/python*/site-packages'))
    for path, text in (
        (other / 'overlock/__init__.py', ''),
        (site / 'overlock.pth', f'{other}\n'),
        (site / 'overlock-1.dist-info/METADATA', 'Metadata-Version: 2.1\nName: overlock\nVersion: 1\n'),
        (site / 'overlock-1.dist-info/direct_url.json', f'{{"dir_info": {{}}, "url": "{other.as_uri()}"}}'),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = environment.probe(python)
    assert found.overlock == other.as_uri()
    assert found.torch is None and found.has == {'pip': False, 'cv2': False, 'mmcv': False}
    tell = """-c 'import importlib.util; print(importlib.util.find_spec("overlock").origin)' """
    made = make('-n', 'demo', VENV=str(tmp_path / 'env')).splitlines()[-1].replace('tools/demo.py', tell)
    for command, home in ((f"'{python}' {tell}", other), (made, ROOT)):
        printed = subprocess.check_output(command, shell=True, cwd='/', env={'PATH': os.environ['PATH']}, text=True)
        assert printed.strip() == str(home / 'overlock/__init__.py')


@pytest.mark.parametrize(
    'change',
    [
        *('requirements/runtime.txt', 'setup.cfg', 'pyproject.toml', 'tools/setup/environment.py'),
        *('overlock/ops/x.cpp', 'mmdet_overlock/__init__.py', '.venv/overlock-stamp'),
        *(dict(torch='2.12.0+cpu'), dict(torch=None), dict(version=[3, 11, 8]), {'FORCE_CUDA': '1'}),
    ],
)
def test_what_changed_calls_for_a_set_up(setup, change):
    setup.start()
    assert setup.is_set_up()
    if isinstance(change, str):
        (setup.root / change).parent.mkdir(exist_ok=True)
        (setup.root / change).write_text('changed')
    elif 'FORCE_CUDA' not in change:
        setup.find(**change)
    assert not setup.is_set_up(**(change if 'FORCE_CUDA' in change else {}))


def test_a_set_up_waits_for_another_one_and_a_second_run_installs_nothing(setup, tmp_path, capsys):
    thread = threading.Thread(target=environment.main, args=(tmp_path,))
    with open(tmp_path / 'overlock-lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and not setup.commands
    thread.join()
    count = len(setup.commands)
    environment.main(tmp_path)
    assert len(setup.commands) == count > 0
    assert capsys.readouterr().out.count('is set up') == 2


@pytest.mark.parametrize(('failure', 'words'), [(SetupError('no'), 'setup: no'), (KeyboardInterrupt(), 'continues')])
def test_script_stops_with_the_message_of_a_failure(setup, monkeypatch, tmp_path, failure, words):
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
    with refused('VENV='):
        environment.create(tmp_path, False, tmp_path / 'log')
    assert [path.name for path in tmp_path.iterdir()] == ['thesis.txt']


def test_environment_of_the_user_gets_pip_and_needs_a_supported_python_and_torch(setup, tmp_path):
    create = environment.create
    setup.find(version=[3, 13, 0])
    with refused(r'3\.13\.0', SystemExit):
        create(tmp_path, False, tmp_path / 'log')
    setup.find(torch='2.5.1+cu121')
    with refused(r'torch >= 2\.6 is needed, got 2\.5\.1\+cu121 .*: upgrade'):
        create(tmp_path, False, tmp_path / 'log')
    for version in ('2.6.0', '2.10.1+cu128', '3.0'):
        setup.find(torch=version)
        assert create(tmp_path, False, tmp_path / 'log').torch == version
    assert setup.commands == []
    setup.find(has={'pip': False})
    create(tmp_path, False, tmp_path / 'log')
    assert setup.commands == [['/env/bin/python', '-m', 'ensurepip']]


def test_missing_compiler_or_headers_stop_the_set_up_before_anything_is_installed(setup):
    setup.find(has={**HAS_ALL, 'mmcv': False})
    with refused(r'nowhere-c\+\+ and /include/python3.11/Python.h was not found.*3\.11-dev'):
        environment.set_up(setup.venv, setup.root, {'CC': 'sh -x', 'CXX': 'nowhere-c++'})
    assert setup.commands == []


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


@pytest.mark.parametrize(
    ('kept', 'steps', 'left'),
    [
        ('', '+prove', ''),
        ('', '-prove +wheel +install +prove', 'new'),
        ('', '-prove -wheel', ''),
        ('', '-prove +wheel +install -prove', 'new'),
        ('old', '-prove +install +prove', 'old'),
        ('old', '-prove -install +wheel +install +prove', 'new'),
        ('old', '-prove +install -prove +wheel +install +prove', 'new'),
    ],
)
def test_mmcv_is_kept_or_from_a_kept_wheel_or_compiled(tmp_path, monkeypatch, kept, steps, left):
    """Steps succeed (+) or fail (-)."""
    tag = 'cp{}{}-{}'.format(*sys.version_info[:2], mmcv_operators.sysconfig.get_platform())
    folder = tmp_path / f'wheels/mmcv2.1.0-torch{torch.__version__}-cpu-{tag}'
    (tmp_path / 'pin').write_text('mmcv==2.1.0 \\\n    --hash=sha256:aa\n')
    if kept:
        folder.mkdir(parents=True)
        (folder / 'mmcv.whl').write_text(kept)
    expected = iter(steps.split())

    def succeeds(command, variables=None):
        if 'c++-header' in command:
            return True
        step = next(expected)
        assert step[1:] == ('prove' if command[1] == '-c' else command[3])
        if step[1:] == 'wheel':
            Path(command[-1], 'mmcv.whl').write_text('new')
            assert {'--no-cache-dir', '--no-build-isolation', '--no-deps', '--require-hashes'} <= set(command)
            assert command[command.index('--no-binary') + 1] == 'mmcv'
            assert re.search(r'-g0 -include \S+/torch\.h$', variables['CPPFLAGS'])
        return step[0] == '+'

    monkeypatch.setattr(mmcv_operators, 'succeeds', succeeds)
    with contextlib.nullcontext() if steps.endswith('+prove') else pytest.raises(SystemExit, match='mmcv'):
        mmcv_operators.set_up(tmp_path / 'pin', {'OVERLOCK_CACHE': str(tmp_path), 'FORCE_CUDA': '0'})
    assert not list(expected)
    assert ''.join(path.read_text() for path in folder.glob('*')) == left


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
def shell(tmp_path):
    """Run a shell command with a log that has a line already."""
    (tmp_path / 'log').write_text('before\n')
    return lambda text, *args, **kwargs: console.run(['sh', '-c', text], tmp_path / 'log', *args, **kwargs)


def test_output_of_a_command_goes_to_the_log_alone(shell, tmp_path, capfd):
    assert shell('echo given $GIVEN', {'GIVEN': 'variable'}) == 'given variable\n'
    assert (tmp_path / 'log').read_text() == 'before\ngiven variable\n'
    assert capfd.readouterr() == ('', '')


def test_failed_command_is_told_with_status_last_lines_and_log(shell, tmp_path):
    with pytest.raises(SetupError, match=rf'(?s)status 3:\n    No space.*{tmp_path}/log'):
        shell('echo No space left on device; exit 3')


@pytest.mark.parametrize('terminal', [False, True])
def test_progress_is_lines_or_one_line_rewritten_on_a_terminal(shell, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: terminal, raising=False)
    shell('echo "[3/6] c++"; sleep 1.2', every=0.5)
    shown = capsys.readouterr().out
    assert '3 of 6 files' in shown
    assert ('\n' not in shown and shown.endswith('\r\x1b[K')) if terminal else '\r' not in shown


def test_interruption_ends_the_command_and_its_children(shell, tmp_path, monkeypatch):
    def interrupt(output, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(console, 'progress', interrupt)
    with pytest.raises(KeyboardInterrupt):
        shell(f'(touch {tmp_path}/started; sleep 2; touch {tmp_path}/outlived) & wait', every=1)
    assert (tmp_path / 'started').exists()
    time.sleep(2)
    assert not (tmp_path / 'outlived').exists()
