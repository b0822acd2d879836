"""What a run says: on a pipe, on a terminal, in its log file."""

import fcntl
import io
import logging
import os
import re
import struct
import termios
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
from mmengine.hooks import Hook
from mmengine.logging import MMLogger, print_log
from mmengine.registry import HOOKS
from pycocotools.coco import COCO

from mmengine_overlock import terminal
from mmengine_overlock.run import test as run_test
from mmengine_overlock.run import train
from mmengine_overlock.terminal import Terminal, calm
from overlock.utils.errors import CheckpointError

MORE = """
custom_hooks = [dict(type='Talkative')]
default_hooks['checkpoint'] = dict(type='CheckpointHook', interval=1, save_best='error', rule='less')
train_cfg.update(max_epochs=2, val_interval=1)
"""
# Written by mmengine at every start, to the log file.
DUMPS = ('System environment:', 'Config:', 'Hooks will be executed in the following order:', 'Epoch(train) [1][8/8]')


@HOOKS.register_module()
class Talkative(Hook):
    """Says what data sets, models and a user's own code may say."""

    def before_train_epoch(self, runner):
        COCO().createIndex()
        print('my own', end=' ')
        print('words')
        warnings.warn('no matter', stacklevel=1)
        print_log('a doubt', 'current', logging.WARNING)
        print_log('this is deprecated', 'current', logging.WARNING)


def log_of(runner):
    with open(runner.logger.log_file) as file:
        return file.read()


def before_progress(lines):
    return next(number for number, line in enumerate(lines) if line.startswith('training:'))


@contextmanager
def screen(monkeypatch, columns=100):
    """A pseudo-terminal as standard output; the list holds what it got once the block has ended."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack('4H', 40, columns, 0, 0))
    parts, shown = [], []

    def read():
        try:
            while part := os.read(master, 65536):
                parts.append(part)
        except OSError:
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, 'w') as stream:
        monkeypatch.setattr('sys.stdout', stream)
        yield shown
        monkeypatch.undo()
    reader.join()
    os.close(master)
    shown.append(b''.join(parts).decode())


def rendered(text):
    """The lines that stay on a terminal which got this text."""
    lines, row = [''], 0
    for part in re.findall(r'\r|\n|\x1b\[A|[^\r\n\x1b]+', text):
        if part == '\n':
            row += 1
            lines += [''] * (row == len(lines))
        elif part == '\x1b[A':
            row -= 1
        elif part != '\r':
            # What is written begins at the left, or goes on at the end.
            lines[row] = part + lines[row][len(part) :]
    return [line.rstrip() for line in lines if line.strip() or line is not lines[-1]]


def test_a_pipe_gets_a_dozen_lines_then_one_an_interval(write_toy, tmp_path, capfd):
    config = write_toy(MORE)
    runner = train(config, work_dir=tmp_path / 'a')
    out, err = capfd.readouterr()
    lines = out.splitlines()
    warned = [line for line in lines if line.startswith('warning: ')]
    lines = [line for line in lines if line not in warned and line != 'my own words']
    assert lines[:8] == [
        f'configuration {config.name}',
        'data          training 16 images, validation 16 images',
        'model         ToyModel with ToyBackbone, 0.00 M parameters',
        'weights       random',
        lines[4],
        'schedule      2 epochs, 16 iterations of 2 images, validation every 1, SGD, learning rate 0.01',
        'results       a',
        f'log           {Path(runner.logger.log_file).relative_to(tmp_path)}',
    ]
    assert re.fullmatch(r'device        cpu, \d+ threads?', lines[4])
    steps = [re.fullmatch(r'training: (\d+)/16 \[\d\d:\d\d<.*, loss=[\d.e+-]+\]', line) for line in lines]
    assert [int(found[1]) for found in steps if found] == [4, 8, 12, 16]
    error = runner.message_hub.get_scalar('val/error').current()
    at = lines.index('validation after epoch 2')
    assert lines[at + 1] == f'  error {error:.3f}  images 16'
    best = runner.message_hub.get_info('best_score')
    assert lines[at + 2 :] == ['last weights  a/epoch_2.pth', f'best weights  a/best_error_epoch_2.pth ({best:.4g})']
    assert err == '' and 'mmengine' not in out and '\r' not in out


def test_warnings_and_a_users_own_words_are_shown_and_the_rest_is_in_the_log(write_toy, tmp_path, capfd):
    runner = train(write_toy(MORE), work_dir=tmp_path / 'a')
    out, log = capfd.readouterr().out, log_of(runner)
    assert out.count('warning: a doubt\n') == 1 and out.count('my own words\n') == 2
    assert not re.search('index|no matter|deprecated', out)
    for text in (*DUMPS, 'creating index...', 'index created!', 'UserWarning: no matter', 'this is deprecated'):
        assert text in log
    for text in ('schedule      2 epochs', 'validation after epoch 2', 'last weights'):
        assert text in log


def test_a_terminal_gets_bars(write_toy, tmp_path, monkeypatch):
    slow = "train_dataloader['dataset']['delay'] = val_dataloader['dataset']['delay'] = 0.05\n"
    with screen(monkeypatch) as shown:
        runner = train(write_toy(MORE + slow), work_dir=tmp_path / 'a')
    bars = re.findall(r'\rtraining: +(\d+)%\|.*?\| +(\d+)/16 \[\d\d:\d\d<\d\d:\d\d, .*?loss=', shown[0])
    assert len(bars) > 3 and 'validation:' in shown[0]
    stays = rendered(shown[0])
    assert 'results       a' in stays and stays[-1].startswith('best weights  ')
    assert [line for line in stays if not line or line.startswith(('training:', 'validation:', 'preparing'))] == []
    assert all(text in log_of(runner) for text in DUMPS)


def test_a_terminal_of_unknown_width_gets_lines(write_toy, tmp_path, monkeypatch):
    with screen(monkeypatch, columns=0) as shown:
        train(write_toy(), work_dir=tmp_path / 'a')
    assert re.search(r'^training: 4/32 .*loss=', shown[0], re.MULTILINE) and '\x1b' not in shown[0]


def test_verbose_is_what_mmengine_writes(write_toy, tmp_path, capfd):
    runner = train(write_toy(MORE), work_dir=tmp_path / 'a', verbose=True)
    out = capfd.readouterr().out
    assert all(text in out for text in (*DUMPS, 'creating index...\n', ' - INFO - '))
    assert not re.search('^(configuration|training:|last weights)', out, re.MULTILINE)
    dump = runner.cfg.pretty_text
    assert dump in out and dump in log_of(runner)


def test_a_test_tells_what_it_tests_and_the_metrics(write_toy, tmp_path, capfd):
    config = write_toy()
    train(config, work_dir=tmp_path / 'a')
    capfd.readouterr()
    checkpoint = str(tmp_path / 'a' / 'epoch_4.pth')
    metrics = run_test(config, checkpoint, work_dir=tmp_path / 'b')
    out = capfd.readouterr().out
    assert 'weights       a/epoch_4.pth\n' in out and 'data          test 16 images\n' in out
    assert out.endswith(f'test\n  error {metrics["error"]:.3f}  images 16\n')


def test_a_resumed_run_tells_where_it_goes_on(write_toy, tmp_path, capfd):
    train(write_toy(MORE), work_dir=tmp_path / 'a')
    capfd.readouterr()
    path = tmp_path / 'a' / 'epoch_1.pth'
    train(write_toy(MORE), work_dir=tmp_path / 'a', resume=str(path))
    out = capfd.readouterr().out
    assert 'weights       a/epoch_1.pth, resumed after iteration 8\n' in out
    assert re.findall(r'^training: (\d+)/16', out, re.MULTILINE) == ['12', '16']


def test_half_a_minute_never_goes_by_in_silence():
    now = [0.0]
    stream = io.StringIO()
    console = Terminal(stream, clock=lambda: now[0])

    def wait(seconds):
        for _ in range(seconds):
            now[0] += 1
            console.beat()
        text = stream.getvalue()
        stream.seek(stream.truncate(0))
        return text

    console.begin('preparing')
    assert wait(29) == ''
    assert wait(1).startswith('preparing [')
    console.end()
    console.begin('training', 100)
    console.advance(3, dict(loss=1.5))
    assert wait(29) == ''
    assert re.fullmatch(r'training: 3/100 \[.*, loss=1.5\]\n', wait(1))
    console.advance(4, due=True)
    assert wait(29).startswith('training: 4/100 ')
    # What is said counts.
    assert wait(1) != ''
    console.close()


def test_time_goes_by_in_a_slow_run(write_toy, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(Terminal.__init__, '__defaults__', (logging.INFO, 1, terminal.time.monotonic))
    more = "train_cfg.update(max_epochs=1)\ntrain_dataloader['dataset'] = dict(type='ToyDataset', delay=0.2)\n"
    train(write_toy(more), work_dir=tmp_path / 'a')
    # After each second, between the intervals of four iterations that take 1.6 seconds.
    assert set(re.findall(r'^training: (\d)/8', capfd.readouterr().out, re.MULTILINE)) > {'4', '8'}


def test_a_run_outlives_the_reader_of_its_output(write_toy, tmp_path, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, 'w')
    monkeypatch.setattr('sys.stdout', stream)
    runner = train(write_toy(), work_dir=tmp_path / 'a')
    monkeypatch.undo()
    with pytest.raises(BrokenPipeError):
        stream.close()
    assert 'last weights' in log_of(runner)


def test_only_the_first_process_speaks_but_errors(monkeypatch, capfd):
    monkeypatch.setenv('RANK', '1')
    with calm('pytorch') as console:
        terminal.tell('a line')
        print_log('a warning', 'current', logging.WARNING)
        console.begin('training', 2)
        console.advance(1, due=True)
        print_log('an error', 'current', logging.ERROR)
    assert capfd.readouterr() == ('error: an error\n', '')


def test_the_loggers_get_their_handlers_back_after_a_mistake(write_toy, tmp_path):
    logger = MMLogger.get_current_instance()
    before = [*logger.handlers]
    with pytest.raises(CheckpointError):
        train(write_toy(), work_dir=tmp_path / 'a', weights='absent.pth')
    assert logger.handlers == before


def test_every_handler_of_a_run_has_an_open_stream_as_the_backend_for_mlflow_expects():
    with calm():
        handlers = MMLogger.get_current_instance().handlers
        assert handlers and not any(handler.stream.closed for handler in handlers)
