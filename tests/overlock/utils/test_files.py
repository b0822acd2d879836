"""Files appear whole or not at all."""

from pathlib import Path

import pytest

from overlock.utils.files import drafted, whole_file


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
