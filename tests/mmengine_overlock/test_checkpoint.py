import os
import zipfile
from collections import OrderedDict

import mmengine.runner.checkpoint
import numpy as np
import pytest
import torch
from mmengine.fileio import get_file_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader, save_checkpoint

from mmengine_overlock import checkpoint
from mmengine_overlock.checkpoint import find_resumable, use_safe_files
from overlock.utils.errors import CheckpointError


@pytest.fixture(autouse=True)
def safe_files():
    use_safe_files()


class Command:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


class Call:
    """Pickles as any call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def trained_checkpoint():
    """The kinds of values that mmengine's runner saves."""
    return dict(
        meta=dict(epoch=1, iter=8, seed=0, dataset_meta=dict(classes=('a', 'b'), palette=np.arange(6).reshape(2, 3))),
        state_dict=OrderedDict(weight=torch.ones(2)),
        message_hub=dict(
            log_scalars=OrderedDict(loss=HistoryBuffer([1.5, 0.5], [1, 1]), empty=HistoryBuffer()),
            runtime_info=OrderedDict(best_score=np.float64(0.25), images=np.int64(3)),
            resumed_keys=dict(loss=True),
        ),
    )


def test_logs_and_numpy_values_survive_a_safe_load(tmp_path):
    path = str(tmp_path / 'a.pth')
    save_checkpoint(trained_checkpoint(), path)
    loaded = CheckpointLoader.load_checkpoint(path, 'cpu')
    loss = loaded['message_hub']['log_scalars']['loss']
    assert type(loss) is HistoryBuffer
    assert loss.mean() == 1.0 and loss.max_length == 1000000
    assert len(loaded['message_hub']['log_scalars']['empty'].data[0]) == 0
    assert loaded['message_hub']['runtime_info'] == dict(best_score=0.25, images=3)
    np.testing.assert_array_equal(loaded['meta']['dataset_meta']['palette'], [[0, 1, 2], [3, 4, 5]])


def test_loaded_logs_can_be_saved_and_loaded_again(tmp_path):
    first, second = str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth')
    save_checkpoint(trained_checkpoint(), first)
    save_checkpoint(CheckpointLoader.load_checkpoint(first, 'cpu'), second)
    hub = CheckpointLoader.load_checkpoint(second, 'cpu')['message_hub']
    assert hub['log_scalars']['loss'].current() == 0.5


@pytest.mark.parametrize('package', [b'numpy.core', b'numpy._core'])
def test_files_of_numpy_1_and_numpy_2_load(tmp_path, package):
    saved, path = tmp_path / 'saved.pth', tmp_path / 'renamed.pth'
    save_checkpoint(trained_checkpoint(), str(saved))
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(path, 'w') as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith('data.pkl'):
                assert b'numpy' in content
                content = content.replace(b'numpy._core', b'numpy.core').replace(b'numpy.core', package)
            target.writestr(name, content)
    hub = CheckpointLoader.load_checkpoint(str(path), 'cpu')['message_hub']
    assert hub['log_scalars']['loss'].current() == 0.5


@pytest.mark.parametrize('legacy', [False, True])
def test_pickled_code_is_named_and_not_run(tmp_path, legacy):
    path, trace = tmp_path / 'evil.pth', tmp_path / 'trace'
    torch.save(dict(state_dict={}, extra=Command(trace)), path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=f'evil.pth asks for the Python object {os.system.__module__}.system'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')
    assert not trace.exists()


def test_pickled_code_from_a_url_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    trace = tmp_path / 'trace'
    torch.save(dict(extra=Command(trace)), tmp_path / 'checkpoints' / 'evil.pth')
    with pytest.raises(CheckpointError, match='asks for the Python object'):
        CheckpointLoader.load_checkpoint('https://example.invalid/evil.pth', 'cpu')
    assert not trace.exists()


def test_every_scheme_of_mmengine_loads_safely():
    ours = {checkpoint.load_from_file, checkpoint.load_from_storage}
    zoos = {'modelzoo://', 'torchvision://', 'open-mmlab://', 'openmmlab://', 'mmcls://'}
    schemes = CheckpointLoader._schemes
    assert {'', 'http://', 'https://'} <= set(schemes) and zoos <= set(schemes)
    assert {loader for scheme, loader in schemes.items() if scheme not in zoos} == ours
    # These look an address up, and go on here.
    assert mmengine.runner.checkpoint.load_from_http is checkpoint.load_from_file


def test_getattr_reaches_nothing(tmp_path):
    path = tmp_path / 'evil.pth'
    torch.save(dict(extra=Call(getattr, np.ndarray, 'tofile')), path)
    with pytest.raises(CheckpointError, match='builtins.getattr'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')


def test_a_file_cannot_replace_the_functions_of_logs(tmp_path):
    path = str(tmp_path / 'a.pth')
    content = trained_checkpoint()
    before = dict(HistoryBuffer._statistics_methods)
    content['message_hub']['log_scalars']['loss']._statistics_methods = dict(mean=OrderedDict)
    save_checkpoint(content, path)
    CheckpointLoader.load_checkpoint(path, 'cpu')
    assert HistoryBuffer._statistics_methods == before


def test_environment_that_trusts_every_file_is_kept_and_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    path, trace = tmp_path / 'evil.pth', tmp_path / 'trace'
    torch.save(dict(extra=Command(trace)), path)
    environment = dict(os.environ)
    with pytest.raises(CheckpointError, match='asks for the Python object'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')
    assert dict(os.environ) == environment and not trace.exists()


@pytest.mark.parametrize('kept', [0.0, 0.01, 0.5, 0.99])
def test_a_cut_off_file_is_one_sentence(tmp_path, kept):
    path = tmp_path / 'cut.pth'
    torch.save(dict(state_dict=dict(weight=torch.ones(10000))), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match='cut.pth is not a whole PyTorch checkpoint'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')


@pytest.mark.parametrize('content', [b'<html>404</html>', b'\x80\x02}.'])
def test_a_file_that_is_no_checkpoint_is_one_sentence(tmp_path, content):
    path = tmp_path / 'a.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match='a.pth is not a whole PyTorch checkpoint'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match='The weight file .*absent.pth does not exist; give the path'):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'absent.pth'), 'cpu')


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'iter_1.pth'
    save_checkpoint(dict(step=1), str(path))

    def interrupt(file):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'fsync', interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(dict(step=2), str(path))
    assert CheckpointLoader.load_checkpoint(str(path), 'cpu') == dict(step=1)
    assert os.listdir(tmp_path) == ['iter_1.pth']


def test_files_get_the_permissions_of_the_user(tmp_path):
    previous = os.umask(0o027)
    try:
        get_file_backend(str(tmp_path)).put_text('text', tmp_path / 'sub' / 'a.txt')
    finally:
        os.umask(previous)
    assert (tmp_path / 'sub' / 'a.txt').read_text() == 'text'
    assert (tmp_path / 'sub' / 'a.txt').stat().st_mode & 0o777 == 0o640


def saved(folder, name, age, cut=False):
    path = folder / name
    torch.save(dict(state_dict=dict(weight=torch.ones(100))), path)
    if cut:
        path.write_bytes(path.read_bytes()[:100])
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_resume_takes_the_checkpoint_that_was_saved_last(tmp_path):
    saved(tmp_path, 'iter_3.pth', age=1)
    last = saved(tmp_path, 'iter_2.pth', age=2)
    (tmp_path / 'last_checkpoint').write_text(str(last))
    assert find_resumable(tmp_path) == last


def test_resume_finds_checkpoints_that_are_kept_elsewhere(tmp_path):
    work_dir, elsewhere = tmp_path / 'work', tmp_path / 'elsewhere'
    work_dir.mkdir()
    elsewhere.mkdir()
    saved(work_dir, 'interrupted.pth', age=2)
    last = saved(elsewhere, 'iter_3.pth', age=1)
    (work_dir / 'last_checkpoint').write_text(str(last))
    assert find_resumable(work_dir) == last


@pytest.mark.parametrize('state', ['cut', 'absent', 'pointer empty'])
def test_resume_falls_back_to_the_newest_whole_checkpoint(tmp_path, state):
    saved(tmp_path, 'iter_1.pth', age=3)
    previous = saved(tmp_path, 'iter_2.pth', age=2)
    saved(tmp_path, 'best_mIoU_iter_2.pth', age=1)
    last = saved(tmp_path, 'iter_3.pth', age=0, cut=True)
    if state == 'absent':
        last.unlink()
    (tmp_path / 'last_checkpoint').write_text('' if state == 'pointer empty' else str(last))
    assert find_resumable(tmp_path) == previous


def test_resume_passes_over_a_checkpoint_with_a_changed_bit(tmp_path):
    previous, last = saved(tmp_path, 'iter_1.pth', age=1), saved(tmp_path, 'iter_2.pth', age=0)
    content = bytearray(last.read_bytes())
    content[content.index(torch.ones(100).numpy().tobytes())] ^= 1
    last.write_bytes(content)
    assert find_resumable(tmp_path) == previous


def test_resume_refuses_a_folder_without_a_whole_checkpoint(tmp_path):
    saved(tmp_path, 'iter_1.pth', age=0, cut=True)
    with pytest.raises(CheckpointError, match='None of the checkpoints in .* is whole'):
        find_resumable(tmp_path)


def test_resume_starts_anew_where_nothing_was_saved(tmp_path):
    assert find_resumable(tmp_path) is None
    assert find_resumable(tmp_path / 'absent') is None
