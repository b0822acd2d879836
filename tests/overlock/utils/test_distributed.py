import logging
import os

import pytest

from overlock.checkpoint import CheckpointError
from overlock.utils.distributed import exit_on_user_error
from overlock.utils.errors import UserError


@pytest.mark.parametrize('kind', [UserError, CheckpointError])
def test_a_mistake_of_the_user_is_its_sentence_and_code_2(kind, capsys, monkeypatch):
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        raise kind('Do that.')
    assert caught.value.code == 2
    assert capsys.readouterr() == ('', 'Do that.\n')


def test_one_process_of_a_machine_speaks_for_all(capsys, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    with pytest.raises(SystemExit), exit_on_user_error():
        raise UserError('Do that.')
    assert capsys.readouterr().err == ''


def test_a_mistake_of_the_program_keeps_its_traceback():
    with pytest.raises(ValueError, match='bug'), exit_on_user_error():
        raise ValueError('bug')


def test_every_process_tells_the_fault_that_it_meets(capsys, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '1')
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        raise OSError(28, os.strerror(28), 'a')
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith('The disk is full; ')


def test_a_log_file_on_a_full_disk_ends_the_process(capsys):
    logger, handler = logging.Logger('a'), logging.FileHandler('/dev/full')
    logger.addHandler(handler)
    with pytest.raises(SystemExit), exit_on_user_error():
        logger.error('line')
    assert capsys.readouterr().err.startswith('The disk is full; ')
    # Elsewhere logging tells of it and goes on.
    logger.error('line')
    assert 'Logging error' in capsys.readouterr().err
    handler.stream = None


@pytest.mark.parametrize(
    'said, line', [('', 'Interrupted: what this command makes is not complete.'), ('a.pth', 'a.pth')]
)
def test_an_interrupt_is_a_line_and_code_130(capsys, said, line):
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        raise KeyboardInterrupt(*[said] * bool(said))
    assert caught.value.code == 130
    assert capsys.readouterr() == ('', f'\n{line}\n')
