import io
import re
import sys
from types import SimpleNamespace

import torch

from mmengine_overlock import hooks
from mmengine_overlock.run import test as run_test
from mmengine_overlock.run import train


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_bars_with_the_remaining_time_above_whole_log_lines(write_toy, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', Terminal())
    train(write_toy(), work_dir=tmp_path / 'a')
    run_test(write_toy(), str(tmp_path / 'a' / 'epoch_4.pth'))
    output = sys.stdout.getvalue()
    for mode, total in (('train', 32), ('val', 8), ('test', 8)):
        assert re.search(rf'{mode}: .*\d+/{total} \[\d\d:\d\d<', output), mode
    lines = [line for line in re.split(r'[\n\r]', output) if 'Epoch(train)' in line]
    assert len(lines) == 8
    assert all(re.fullmatch(r'\d\d/\d\d \d\d:\d\d:\d\d - mmengine - .*loss: \d+\.\d+ *', line) for line in lines)


def test_a_log_file_gets_no_bars(write_toy, capsys):
    train(write_toy())
    out, err = capsys.readouterr()
    assert 'Epoch(train)' in out
    assert not re.search(r'\d+/32 \[', out + err)


def test_boxes_only_turns_every_mask_head_off():
    class RoIHead(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mask_head = torch.nn.Linear(1, 1)

    model = torch.nn.Sequential(RoIHead())
    hooks.BoxesOnlyHook().before_test(SimpleNamespace(model=model))
    assert model[0].mask_head is None
