"""The set-up behind `make demo` and `make test`, without network: commands go to a console that only records them."""

import ast
import configparser
import io
import os
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / 'tools'))

import setup_env  # noqa: E402
import setup_interpreter  # noqa: E402
import setup_mmcv  # noqa: E402
from setup_console import Console, Progress, SetupError, excerpt  # noqa: E402
from setup_interpreter import Interpreter  # noqa: E402

CPU = setup_mmcv.OpsPlan('cpu', 'cpu', {'MMCV_WITH_OPS': '1', 'MAX_JOBS': '2', 'FORCE_CUDA': '0'})
NVCC = ('/usr/local/cuda', '13.0')


class RecordingConsole(Console):
    """Records commands; `effects` maps a word of a command to what is to happen when it would run."""

    def __init__(self, folder: Path, **effects) -> None:
        super().__init__(folder / 'setup.log', io.StringIO())
        self.commands: list[list[str]] = []
        self.variables: list[dict] = []
        self.effects = effects

    def run(self, command, variables=None) -> None:
        self.commands.append([str(part) for part in command])
        self.variables.append(dict(variables or {}))
        for word, effect in self.effects.items():
            if word in command:
                effect(command)

    @property
    def text(self) -> str:
        return self.out.getvalue()


def an_interpreter(**fields) -> Interpreter:
    defaults = dict(
        python='/env/bin/python',
        version=(3, 11, 7),
        platform='linux-x86_64',
        site='/env/site',
        include='/include',
        torch='2.11.0+cu130',
        torch_cuda='13.0',
        torchvision='0.26.0',
    )
    return Interpreter(**{**defaults, **fields})


def write_wheel(folder: Path, member: str = 'mmcv/_ext.cpython-311-x86_64-linux-gnu.so') -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'mmcv-2.1.0-cp311-cp311-linux_x86_64.whl'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, bytes(range(256)) * 64)
        wheel.writestr('mmcv/__init__.py', '')
    return path


def builds_wheel(command) -> None:
    write_wheel(Path(command[command.index('-w') + 1]))


def stops(command) -> None:
    raise SetupError('stopped')


def one_sentence(error) -> str:
    text = str(error.value)
    assert '\n' not in text
    return text


# --- Python


@pytest.mark.parametrize('version', [(3, 6, 15), (3, 9, 18), (3, 13, 0), (4, 0, 0)])
def test_unsuitable_python_is_refused_with_accepted_found_and_remedy(version):
    refusal = setup_env.python_refusal(version, '/usr/bin/python3')
    assert '3.10, 3.11 or 3.12' in refusal and '.'.join(map(str, version)) in refusal
    assert '/usr/bin/python3' in refusal and 'PYTHON=' in refusal and '\n' not in refusal


@pytest.mark.parametrize('version', [(3, 10, 0), (3, 11, 7), (3, 12, 99)])
def test_suitable_python_is_accepted(version):
    assert setup_env.python_refusal(version, 'python3') == ''


def test_an_old_python_can_read_the_script_as_far_as_its_refusal():
    ast.parse((ROOT / 'tools/setup_env.py').read_text(), feature_version=(3, 7))


def make(*arguments: str, **variables: str) -> str:
    cleared = {'PYTHON', 'VENV', 'MAKEFLAGS', 'MFLAGS', 'MAKELEVEL', 'MAKEOVERRIDES', 'PYTEST_ARGS', 'DEMO_ARGS'}
    environ = {name: value for name, value in os.environ.items() if name not in cleared}
    return subprocess.run(
        ['make', *arguments], cwd=ROOT, env={**environ, **variables}, check=True, capture_output=True, text=True
    ).stdout


def fake_python(folder: Path, name: str, status: int) -> None:
    (folder / name).write_text(f'#!/bin/sh\nexit {status}\n')
    (folder / name).chmod(0o755)


def test_make_takes_the_next_suitable_python_on_path(tmp_path):
    for name, status in (('python3', 1), ('python3.12', 127), ('python3.11', 0)):
        fake_python(tmp_path, name, status)
    assert 'python3.11 tools/setup_env.py' in make('-n', 'setup', PATH=f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')


def test_make_takes_the_python_and_environment_that_are_named():
    assert "python3.12 tools/setup_env.py --venv '/my/env'" in make('-n', 'setup', PYTHON='python3.12', VENV='/my/env')


def test_make_test_runs_the_suite_of_the_environment_with_further_arguments():
    assert "'.venv/bin/python' -m pytest -k word" in make('-n', 'test', 'PYTEST_ARGS=-k word')


def test_make_alone_lists_every_target():
    listed = make()
    assert all(f'make {target}' in listed for target in ('setup', 'demo', 'test', 'test-fast', 'clean'))


# --- requirements


def test_no_requirement_or_configuration_names_an_index():
    files = [*ROOT.glob('requirements/*.txt'), ROOT / 'setup.cfg', ROOT / 'pyproject.toml', ROOT / 'Makefile']
    assert len(files) > 4
    for path in files:
        assert '://' not in path.read_text() and 'index-url' not in path.read_text(), path


def test_package_requires_no_torch_and_no_extra_brings_mmcv():
    parser = configparser.ConfigParser()
    parser.read(ROOT / 'setup.cfg')
    extras = dict(parser['options.extras_require'])
    assert set(extras) == {'det', 'seg', 'timm', 'imagenet', 'natten', 'dev'}
    assert parser['options']['install_requires'] == ''
    required = [line.strip() for text in extras.values() for line in text.split('\n')]
    assert not [line for line in required if line.startswith(('torch', 'mmcv'))]


# --- the stamp


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / 'checkout'
    for name in ('requirements/torch.txt', 'setup.cfg', 'pyproject.toml', 'tools/setup_env.py', 'overlock/__init__.py'):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / '.venv').mkdir()
    return root


@pytest.fixture
def installed(monkeypatch):
    """A set-up that finds everything installed, but for what its console runs."""
    interpreter = an_interpreter(mmcv='2.1.0')
    for name, stub in dict(
        probe=lambda python: interpreter,
        probe_surely=lambda python: interpreter,
        visible_gpus=lambda found: [],
        create_environment=lambda *_: interpreter,
        install_mmcv=lambda *_: None,
    ).items():
        monkeypatch.setattr(setup_env, name, stub)


@pytest.fixture
def stamped(checkout, monkeypatch):
    """A checkout whose environment is set up, and the interpreter that the probe finds there."""
    found = [an_interpreter()]
    monkeypatch.setattr(setup_env, 'probe', lambda python: found[0])
    setup_env.write_stamp(checkout / '.venv', setup_env.stamp_key(checkout, found[0]), 'cpu')
    return checkout, found


def test_finished_set_up_is_recognized(stamped):
    root, _ = stamped
    assert setup_env.is_set_up(root / '.venv', root, {})


@pytest.mark.parametrize('name', ['requirements/torch.txt', 'setup.cfg', 'pyproject.toml', 'tools/setup_env.py'])
def test_changed_requirements_call_for_a_set_up(stamped, name):
    root, _ = stamped
    (root / name).write_text('changed')
    assert not setup_env.is_set_up(root / '.venv', root, {})


@pytest.mark.parametrize('change', [dict(torch='2.12.0+cpu'), dict(torch=None), dict(version=(3, 11, 8))])
def test_changed_torch_or_python_calls_for_a_set_up(stamped, change):
    root, found = stamped
    found[0] = replace(found[0], **change)
    assert not setup_env.is_set_up(root / '.venv', root, {})


def test_new_package_calls_for_a_set_up(stamped):
    root, _ = stamped
    (root / 'mmdet_overlock').mkdir()
    (root / 'mmdet_overlock/__init__.py').write_text('')
    assert not setup_env.is_set_up(root / '.venv', root, {})


def test_cuda_operators_asked_for_call_for_a_set_up_unless_they_are_there(stamped):
    root, found = stamped
    assert not setup_env.is_set_up(root / '.venv', root, {'FORCE_CUDA': '1'})
    setup_env.write_stamp(root / '.venv', setup_env.stamp_key(root, found[0]), 'cuda')
    assert setup_env.is_set_up(root / '.venv', root, {'FORCE_CUDA': '1'})


@pytest.mark.parametrize('content', [None, '', '{}', '[]', '{"key": "x"'])
def test_missing_or_damaged_stamp_calls_for_a_set_up(stamped, content):
    root, _ = stamped
    stamp = root / '.venv' / setup_env.STAMP
    stamp.unlink() if content is None else stamp.write_text(content)
    assert not setup_env.is_set_up(root / '.venv', root, {})


def test_environment_whose_python_does_not_run_calls_for_a_set_up(stamped):
    root, found = stamped
    found[0] = None
    assert not setup_env.is_set_up(root / '.venv', root, {})


def test_second_run_of_the_script_sets_nothing_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup_env, 'probe', lambda python: an_interpreter())
    monkeypatch.setattr(setup_env.signal, 'signal', lambda *_: None)
    calls = []

    def set_up(venv, root, environ, console):
        calls.append(venv)
        setup_env.write_stamp(venv, setup_env.stamp_key(root, an_interpreter()), 'cpu')

    monkeypatch.setattr(setup_env, 'set_up', set_up)
    assert [setup_env.main(['--venv', str(tmp_path / 'env')]) for _ in range(2)] == [0, 0]
    assert calls == [tmp_path / 'env']
    assert capsys.readouterr().out.count('is set up') == 2


def test_interrupted_set_up_is_continued_and_only_then_stamped(checkout, installed):
    venv = checkout / '.venv'
    with pytest.raises(SetupError):
        setup_env.set_up(venv, checkout, {}, RecordingConsole(venv, **{'--no-deps': stops}))
    assert not setup_env.is_set_up(venv, checkout, {})
    console = RecordingConsole(venv)
    setup_env.set_up(venv, checkout, {}, console)
    assert setup_env.is_set_up(venv, checkout, {})
    assert console.text.count('[') == 6 and '[5/6] this package' in console.text
    assert console.commands[-2][-2:] == ['-e', str(checkout)]
    assert console.commands[-1][-2:] == ['-m', 'overlock.ops.build']


def test_set_up_goes_on_without_the_optional_operators(checkout, installed):
    venv = checkout / '.venv'
    console = RecordingConsole(venv, **{'overlock.ops.build': stops})
    setup_env.set_up(venv, checkout, {}, console)
    assert setup_env.is_set_up(venv, checkout, {})
    assert 'optional and could not be compiled' in console.text


def test_one_set_up_waits_for_another(tmp_path, capsys):
    events = []

    def second():
        with setup_env.locked(tmp_path / 'env/lock'):
            events.append('second')

    with setup_env.locked(tmp_path / 'env/lock'):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        events.append('first')
    thread.join(5)
    assert events == ['first', 'second']
    assert 'waiting' in capsys.readouterr().out


# --- the environment


def test_probe_tells_the_torch_of_an_environment_without_importing_it():
    torch = pytest.importorskip('torch')
    found = setup_interpreter.probe(sys.executable)
    assert (found.torch, found.torch_cuda) == (torch.__version__, torch.version.cuda)
    assert found.version == sys.version_info[:3] and (Path(found.site) / 'torch').is_dir()
    assert 'import torch' not in setup_interpreter.PROBE


def test_python_that_does_not_run_is_told(tmp_path):
    assert setup_interpreter.probe(tmp_path / 'bin/python') is None
    with pytest.raises(SetupError, match='does not run'):
        setup_interpreter.probe_surely(tmp_path / 'bin/python')


def really_runs(command) -> None:
    subprocess.run(command, check=True)


def test_half_made_own_environment_is_made_anew_and_gets_pip(tmp_path):
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin/python').symlink_to(tmp_path / 'gone')
    console = RecordingConsole(tmp_path, venv=really_runs)
    found = setup_env.create_environment(tmp_path, True, console)
    assert found.version == sys.version_info[:3] and Path(found.python).parent == tmp_path / 'bin'
    assert [command[2] for command in console.commands] == ['venv', 'ensurepip']


def test_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / 'thesis.txt').write_text('mine')
    with pytest.raises(SetupError, match='VENV=') as error:
        setup_env.create_environment(tmp_path, False, RecordingConsole(tmp_path))
    one_sentence(error)
    assert (tmp_path / 'thesis.txt').read_text() == 'mine'


def test_environment_of_an_unsuitable_python_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(setup_env, 'probe', lambda python: an_interpreter(version=(3, 13, 0)))
    with pytest.raises(SetupError, match=r'3\.13\.0'):
        setup_env.create_environment(tmp_path, False, RecordingConsole(tmp_path))


@pytest.mark.parametrize('torch', ['2.4.0', '2.10.1+cu128', '2.13.0+cpu', '3.0.0'])
def test_torch_of_a_named_environment_is_kept(torch):
    assert setup_env.keeps_torch(an_interpreter(torch=torch), own=False)


def test_old_torch_of_a_named_environment_is_refused_not_replaced():
    with pytest.raises(SetupError, match=r'torch >= 2\.4 is needed, got 2\.3\.1\+cu121 .*: upgrade torch') as error:
        setup_env.keeps_torch(an_interpreter(torch='2.3.1+cu121'), own=False)
    one_sentence(error)


def test_tested_torch_is_installed_where_there_is_none_and_in_the_own_environment():
    assert not setup_env.keeps_torch(an_interpreter(torch=None), own=False)
    assert not setup_env.keeps_torch(an_interpreter(), own=True)


def test_libraries_leave_torch_and_opencv_of_a_named_environment_alone(tmp_path):
    console = RecordingConsole(tmp_path)
    setup_env.install_libraries(an_interpreter(torch='2.13.0+cpu', cv2=True), ROOT, False, console)
    libraries, openmmlab = console.commands
    assert libraries[-2:] == ['torch==2.13.0', 'torchvision==0.26.0']
    assert not [part for part in libraries if part.endswith(('opencv.txt', '/torch.txt'))]
    assert '--no-deps' in openmmlab


def test_headless_opencv_comes_where_there_is_none(tmp_path):
    console = RecordingConsole(tmp_path)
    setup_env.install_libraries(an_interpreter(), ROOT, False, console)
    assert str(ROOT / 'requirements/opencv.txt') in console.commands[0]


# --- mmcv's operators: what is compiled


def which_but(*missing):
    return lambda tool: None if tool in missing else f'/usr/bin/{tool}'


def test_missing_compiler_is_told_with_a_remedy(tmp_path):
    with pytest.raises(SetupError, match=r'c\+\+ was not found.*apt install build-essential') as error:
        setup_mmcv.check_compiler(an_interpreter(include=str(tmp_path)), {}, which_but('c++'))
    one_sentence(error)


def test_compiler_named_by_variables_counts(tmp_path):
    (tmp_path / 'Python.h').write_text('')
    chosen = {'CC': 'ccache clang', 'CXX': 'clang++'}
    setup_mmcv.check_compiler(an_interpreter(include=str(tmp_path)), chosen, which_but('gcc', 'c++'))


def test_missing_python_headers_are_told_with_a_remedy(tmp_path):
    with pytest.raises(SetupError, match=r'Python\.h is missing.*apt install python3\.11-dev') as error:
        setup_mmcv.check_compiler(an_interpreter(include=str(tmp_path)), {}, which_but())
    one_sentence(error)


def test_compiler_is_checked_before_anything_is_installed(checkout, monkeypatch):
    monkeypatch.setattr(setup_env, 'probe', lambda python: None)
    monkeypatch.setattr(setup_env, 'probe_surely', lambda python: an_interpreter(torch=None, include='/nowhere'))
    console = RecordingConsole(checkout / '.venv')
    with pytest.raises(SetupError, match='compiled here'):
        setup_env.set_up(checkout / '.venv', checkout, {}, console)
    assert console.commands == [] and console.text == ''


@pytest.mark.parametrize(('gpus', 'environ'), [([], {}), (['9.0'], {'FORCE_CUDA': '0'})])
def test_cpu_operators_are_compiled_with_gpus_hidden(gpus, environ):
    plan = setup_mmcv.plan_ops(an_interpreter(), gpus, NVCC, environ)
    assert (plan.target, plan.key, plan.note) == ('cpu', 'cpu', '')
    assert plan.variables['FORCE_CUDA'] == '0' and plan.variables['CUDA_VISIBLE_DEVICES'] == ''
    assert plan.variables['MMCV_WITH_OPS'] == '1' and int(plan.variables['MAX_JOBS']) >= 1


def test_cuda_operators_find_the_headers_that_torch_brings(tmp_path):
    for part in ('cu13', 'cudnn'):
        (tmp_path / 'nvidia' / part / 'include').mkdir(parents=True)
    environ = {'CPATH': '/mine', 'MAX_JOBS': '3'}
    plan = setup_mmcv.plan_ops(an_interpreter(site=str(tmp_path)), ['9.0'], NVCC, environ)
    assert (plan.target, plan.key) == ('cuda', 'cu13.0-sm90')
    assert plan.variables['FORCE_CUDA'] == '1' and plan.variables['MAX_JOBS'] == '3'
    assert plan.variables['CUDA_HOME'] == NVCC[0]
    assert plan.variables['CPATH'] == f'{tmp_path}/nvidia/cu13/include:{tmp_path}/nvidia/cudnn/include:/mine'


def test_cuda_operators_can_be_forced_for_a_named_architecture():
    environ = {'FORCE_CUDA': '1', 'TORCH_CUDA_ARCH_LIST': '8.0;9.0+PTX'}
    plan = setup_mmcv.plan_ops(an_interpreter(), [], NVCC, environ)
    assert (plan.target, plan.key) == ('cuda', 'cu13.0-sm80_90+PTX')


OBSTACLES = [
    (an_interpreter(torch='2.11.0+cpu', torch_cuda=None), NVCC, {}, 'built for the CPU'),
    (an_interpreter(), None, {}, 'nvcc was not found'),
    (an_interpreter(), (NVCC[0], '12.4'), {}, 'is of CUDA 12.4'),
    (an_interpreter(), NVCC, {'TORCH_CUDA_ARCH_LIST': ''}, 'TORCH_CUDA_ARCH_LIST=9.0'),
]


@pytest.mark.parametrize(('interpreter', 'nvcc', 'environ', 'reason'), OBSTACLES)
def test_forced_cuda_that_cannot_be_compiled_is_refused(interpreter, nvcc, environ, reason):
    with pytest.raises(SetupError, match=reason) as error:
        setup_mmcv.plan_ops(interpreter, [], nvcc, {**environ, 'FORCE_CUDA': '1'})
    one_sentence(error)


@pytest.mark.parametrize(('interpreter', 'nvcc', 'environ', 'reason'), OBSTACLES[1:3])
def test_gpu_that_cannot_be_compiled_for_is_noted(interpreter, nvcc, environ, reason):
    plan = setup_mmcv.plan_ops(interpreter, ['9.0'], nvcc, environ)
    assert plan.target == 'cpu' and reason in plan.note


def write_nvcc(folder: Path, toolkit: str) -> None:
    folder.mkdir(parents=True)
    (folder / 'nvcc').write_text(f"""#!/bin/sh
echo "Cuda compilation tools, release 12.8, V12.8.93"
echo "#$ _HERE_={toolkit}/bin"
""")
    (folder / 'nvcc').chmod(0o755)


def test_toolkit_is_found_in_cuda_home(tmp_path):
    write_nvcc(tmp_path / 'bin', '/elsewhere')
    assert setup_mmcv.find_nvcc({'CUDA_HOME': str(tmp_path)}) == (str(tmp_path), '12.8')
    assert setup_mmcv.find_nvcc({'CUDA_HOME': str(tmp_path / 'nowhere')}) is None


def test_toolkit_is_found_behind_a_wrapper_on_path(tmp_path, monkeypatch):
    write_nvcc(tmp_path / 'wrappers', '/usr/local/cuda-12.8')
    monkeypatch.setenv('PATH', str(tmp_path / 'wrappers'), prepend=os.pathsep)
    assert setup_mmcv.find_nvcc({}) == ('/usr/local/cuda-12.8', '12.8')


# --- mmcv's operators: the cache


def test_cache_folder_is_where_the_variables_say(tmp_path):
    assert setup_mmcv.cache_folder({'OVERLOCK_CACHE': str(tmp_path), 'XDG_CACHE_HOME': '/x'}) == tmp_path
    assert setup_mmcv.cache_folder({'XDG_CACHE_HOME': '/x'}) == Path('/x/overlock')
    assert setup_mmcv.cache_folder({}) == Path.home() / '.cache/overlock'


def test_cache_entry_differs_by_torch_cuda_python_and_platform(tmp_path):
    variants = [
        (an_interpreter(), CPU),
        (an_interpreter(torch='2.11.0+cpu'), CPU),
        (an_interpreter(version=(3, 12, 1)), CPU),
        (an_interpreter(platform='linux-aarch64'), CPU),
        (an_interpreter(), replace(CPU, key='cu13.0-sm90')),
        (an_interpreter(), replace(CPU, key='cu13.0-sm80')),
    ]
    folders = [setup_mmcv.wheel_folder(tmp_path, *variant) for variant in variants]
    assert len(set(folders)) == len(variants)
    assert folders[0] == tmp_path / 'wheels/mmcv2.1.0-torch2.11.0+cu130-cpu-cp311-linux-x86_64'


def test_cache_entry_is_the_same_for_another_patch_release_of_python(tmp_path):
    folders = {setup_mmcv.wheel_folder(tmp_path, an_interpreter(version=(3, 11, patch)), CPU) for patch in (2, 7)}
    assert len(folders) == 1


def damage_middle(content: bytes) -> bytes:
    middle = 60
    return content[:middle] + bytes(byte ^ 255 for byte in content[middle : middle + 40]) + content[middle + 40 :]


@pytest.mark.parametrize('damage', [lambda content: content[: len(content) // 2], damage_middle, lambda content: b''])
def test_damaged_wheel_is_not_taken(tmp_path, damage):
    path = write_wheel(tmp_path)
    assert setup_mmcv.whole_wheel(tmp_path) == path
    path.write_bytes(damage(path.read_bytes()))
    assert setup_mmcv.whole_wheel(tmp_path) is None


def test_wheel_without_operators_is_not_taken(tmp_path):
    write_wheel(tmp_path, member='mmcv/cnn.py')
    assert setup_mmcv.whole_wheel(tmp_path) is None


def install(tmp_path, console, interpreter=None, proofs=('',)):
    """Runs `install_mmcv` with the given results of its proofs, in turn."""
    results = iter(proofs)
    interpreter = interpreter or an_interpreter(include=str(tmp_path))
    (tmp_path / 'Python.h').write_text('')
    setup_mmcv.install_mmcv(
        interpreter, CPU, tmp_path / 'entry', console, {'CC': 'sh', 'CXX': 'sh'}, lambda *_: next(results)
    )


def test_wheel_compiled_earlier_is_installed_without_compiling(tmp_path):
    wheel, console = write_wheel(tmp_path / 'entry'), RecordingConsole(tmp_path)
    install(tmp_path, console)
    assert [command[3] for command in console.commands] == ['install']
    assert console.commands[0][-1] == str(wheel) and '--no-deps' in console.commands[0]


@pytest.mark.parametrize('damaged', [False, True])
def test_missing_or_damaged_wheel_is_compiled_and_kept(tmp_path, damaged):
    if damaged:
        write_wheel(tmp_path / 'entry').write_bytes(b'PK\x03\x04 cut off')
    console = RecordingConsole(tmp_path, wheel=builds_wheel)
    install(tmp_path, console)
    assert [command[3] for command in console.commands] == ['wheel', 'install']
    kept = setup_mmcv.whole_wheel(tmp_path / 'entry')
    assert console.commands[1][-1] == str(kept)
    assert list((tmp_path / 'entry').iterdir()) == [kept]


def test_operators_are_compiled_from_source_against_the_installed_torch_past_every_pip_cache(tmp_path):
    console = RecordingConsole(tmp_path, wheel=builds_wheel)
    setup_mmcv.build_wheel(an_interpreter(), CPU, tmp_path / 'entry', console)
    command = console.commands[0]
    assert command[0] == '/env/bin/python' and command[-1] == 'mmcv==2.1.0'
    assert {'--no-cache-dir', '--no-build-isolation', '--no-deps'} <= set(command)
    assert command[command.index('--no-binary') + 1] == 'mmcv'
    assert console.variables[0] == CPU.variables


def test_failed_compilation_leaves_nothing_in_the_cache(tmp_path):
    console = RecordingConsole(tmp_path, wheel=lambda command: (builds_wheel(command), stops(command)))
    with pytest.raises(SetupError):
        setup_mmcv.build_wheel(an_interpreter(), CPU, tmp_path / 'entry', console)
    assert list((tmp_path / 'entry').iterdir()) == []


def test_compilation_that_skipped_the_operators_is_refused(tmp_path):
    console = RecordingConsole(tmp_path, wheel=lambda command: write_wheel(Path(command[-2]), 'mmcv/cnn.py'))
    with pytest.raises(SetupError, match='without its operators'):
        setup_mmcv.build_wheel(an_interpreter(), CPU, tmp_path / 'entry', console)
    assert list((tmp_path / 'entry').iterdir()) == []


def test_cache_that_cannot_be_written_is_told_with_the_variable(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(SetupError, match='OVERLOCK_CACHE') as error:
        setup_mmcv.build_wheel(an_interpreter(), CPU, tmp_path / 'file/entry', RecordingConsole(tmp_path))
    one_sentence(error)


def test_working_mmcv_is_kept(tmp_path):
    console = RecordingConsole(tmp_path)
    install(tmp_path, console, an_interpreter(mmcv='2.1.0'))
    assert console.commands == [] and 'operators work' in console.text


def test_mmcv_whose_operators_fail_is_replaced(tmp_path):
    write_wheel(tmp_path / 'entry')
    console = RecordingConsole(tmp_path)
    install(tmp_path, console, an_interpreter(mmcv='2.1.0'), proofs=('undefined symbol', ''))
    assert '--force-reinstall' in console.commands[0]


def test_operators_that_fail_in_the_end_stop_the_set_up_with_what_to_do(tmp_path):
    write_wheel(tmp_path / 'entry')
    console = RecordingConsole(tmp_path)
    with pytest.raises(SetupError) as error:
        install(tmp_path, console, proofs=('Traceback\nImportError: _ext.so: undefined symbol: _ZN3c10',))
    text = str(error.value)
    assert f'Remove {tmp_path / "entry"} and run again' in text and 'undefined symbol: _ZN3c10' in text
    assert 'torch 2.11.0+cu130' in text and 'Python 3.11.7' in text and str(console.log) in text


@pytest.mark.slow
def test_proof_calls_the_operators_of_this_environment():
    pytest.importorskip('mmcv')
    pytest.importorskip('torchvision')
    interpreter = setup_interpreter.probe(sys.executable)
    assert setup_mmcv.prove_ops(interpreter, 'cpu') == ''


def test_proof_reports_an_environment_without_mmcv(tmp_path):
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path], check=True)
    problem = setup_mmcv.prove_ops(an_interpreter(python=str(tmp_path / 'bin/python')), 'cpu')
    assert 'ModuleNotFoundError' in problem


# --- what the user sees


def test_compilation_is_told_in_files_percentage_and_time():
    progress = Progress(now=0)
    progress.feed('  Building wheel for mmcv (setup.py): started\n', 2)
    assert progress.text(5) == '0:05 elapsed  Building wheel for mmcv (setup.py): started'
    progress.feed('  [1/77] c++ -MMD -MF /tmp/active_rotated_filter.o.d -c -o x.o -std=c++17\n', 10)
    assert progress.text(10) == '1/77 files  1%  0:10 elapsed'
    progress.feed('  /tmp/x.cpp:12: warning: comparison [-Wsign-compare]\n', 40)
    progress.feed('  [12/77] c++ -MMD -MF /tmp/gather_points.o.d -c -o y.o\n', 65)
    assert progress.text(65) == '12/77 files  15%  1:05 elapsed, about 5:25 left'


def test_pip_is_told_by_what_it_does_now():
    progress = Progress(now=0)
    progress.feed('Collecting torch==2.11.0\n', 1)
    progress.feed(f'Installing collected packages: {", ".join(["package"] * 30)}\n', 2)
    assert progress.text(63).startswith('1:03 elapsed  Installing collected packages: package,')
    assert len(progress.text(63)) < 110


def test_excerpt_shows_the_first_errors_and_the_last_lines():
    noise = [f'c++ -c file{index}.cpp' for index in range(50)]
    shown = excerpt(['x.cpp:3: fatal error: cusparse.h: No such file', *noise, "error: command 'ninja' failed"])
    assert 'cusparse.h' in shown and "'ninja' failed" in shown and 'file49.cpp' in shown
    assert 'file0.cpp' not in shown and len(shown.splitlines()) == 12


def python(code: str) -> list[str]:
    return [sys.executable, '-c', code]


def test_output_of_a_command_goes_to_the_log_alone(tmp_path):
    console = Console(tmp_path / 'log', io.StringIO())
    console.run(python('import os; print("given", os.environ["GIVEN"])'), {'GIVEN': 'variable'})
    assert 'given variable' in console.log.read_text()
    assert console.out.getvalue() == ''


def test_failed_command_is_told_with_status_last_lines_and_log(tmp_path):
    console = Console(tmp_path / 'log', io.StringIO())
    with pytest.raises(SetupError) as error:
        console.run(python('print("No space left on device"); raise SystemExit(3)'))
    assert 'exit status 3' in str(error.value) and 'No space left on device' in str(error.value)
    assert str(tmp_path / 'log') in str(error.value)


def test_progress_comes_in_plain_lines_where_there_is_no_terminal(tmp_path):
    console = Console(tmp_path / 'log', io.StringIO(), every=0.0)
    console.run(python('import time; print("[3/6] c++", flush=True); time.sleep(1.2)'))
    lines = console.out.getvalue().splitlines()
    assert lines and all('\r' not in line and '\x1b' not in line for line in lines)
    assert '3/6 files  50%' in lines[-1]


def test_progress_rewrites_one_line_on_a_terminal(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    console = Console(tmp_path / 'log', Terminal())
    console.run(python('import time; print("[3/6] c++", flush=True); time.sleep(0.7)'))
    shown = console.out.getvalue()
    assert '\n' not in shown and shown.endswith('\r\x1b[K') and '3/6 files  50%' in shown


def test_step_is_numbered_and_tells_its_time(tmp_path):
    console = Console(tmp_path / 'log', io.StringIO())
    with console.step('first'):
        pass
    with pytest.raises(SetupError), console.step('second'):
        raise SetupError('no')
    assert console.out.getvalue().splitlines() == ['[1/6] first', '      done in 0:00', '[2/6] second']


def test_interruption_ends_the_command_and_its_children(tmp_path):
    class Interrupting(io.StringIO):
        def isatty(self):
            deadline = time.monotonic() + 10
            while not (tmp_path / 'started').exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            raise KeyboardInterrupt

    script = f'(touch {tmp_path}/started; sleep 0.6; touch {tmp_path}/outlived) & wait'
    with pytest.raises(KeyboardInterrupt):
        Console(tmp_path / 'log', Interrupting()).run(['sh', '-c', script])
    assert (tmp_path / 'started').exists()
    time.sleep(1.0)
    assert not (tmp_path / 'outlived').exists()


def test_script_stops_with_the_message_and_status_of_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup_env, 'is_set_up', lambda *_: False)
    monkeypatch.setattr(setup_env.signal, 'signal', lambda *_: None)
    for failure, status, words in (
        (SetupError('no compiler'), 1, 'setup: no compiler'),
        (KeyboardInterrupt(), 130, 'the next run goes on'),
    ):
        monkeypatch.setattr(setup_env, 'set_up', lambda *_, failure=failure: (_ for _ in ()).throw(failure))
        assert setup_env.main(['--venv', str(tmp_path)]) == status
        assert words in capsys.readouterr().err
