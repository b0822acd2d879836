"""Files appear whole or not at all."""

import resource
from pathlib import Path

import pytest
import torch

from overlock.utils.errors import UserError
from overlock.utils.files import check_writable, drafted, whole_file


def test_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / 'deeper' / 'a'
    with whole_file(path) as file:
        file.write(b'old')
        assert not path.exists()
    with pytest.raises(KeyError), whole_file(path) as file:
        file.write(b'new')
        raise KeyError
    assert path.read_bytes() == b'old' and list(path.parent.iterdir()) == [path]


def test_drafts_take_their_places_together_and_leave_no_folder(tmp_path):
    paths = [tmp_path / 'a', tmp_path / 'b']
    with drafted(*paths) as drafts:
        assert all(draft.parent.parent == tmp_path for draft in drafts)
        for draft in drafts:
            draft.write_text('new')
    assert sorted(tmp_path.iterdir()) == paths and all(path.read_text() == 'new' for path in paths)
    with pytest.raises(KeyError), drafted(*paths) as drafts:
        Path(drafts[0]).write_text('newer')
        raise KeyError
    assert sorted(tmp_path.iterdir()) == paths and all(path.read_text() == 'new' for path in paths)


def test_an_error_of_the_system_names_the_file(tmp_path):
    for fail in (lambda file: file.write(bytes(2**22)), lambda file: torch.save(torch.zeros(2**20), file)):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
        try:
            with pytest.raises(OSError, match=f'File too large: .{tmp_path}/a'), whole_file(tmp_path / 'a') as file:
                fail(file)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_checked_before_it_is_written_to(tmp_path):
    check_writable(tmp_path / 'new' / 'a')
    assert not list(tmp_path.iterdir())
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='/file/a cannot be written .*; give a path in a writable folder'):
        check_writable(tmp_path / 'file' / 'a')
