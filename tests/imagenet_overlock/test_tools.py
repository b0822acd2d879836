"""The command lines, in one process and in two."""

import csv
import json
import logging
import runpy
import subprocess
import sys

import pytest
import torch

from imagenet_overlock.checkpoints import read_checkpoint
from imagenet_overlock.validate import validate
from tests.imagenet_overlock import tiny
from tests.imagenet_overlock.conftest import TRAIN, VALIDATE

EPOCHS = '--epochs 2 --warmup-epochs 0 --cooldown-epochs 0'
TINY = f'--model overlock_tiny --img-size 32 {EPOCHS} --lr 1e-3 --no-amp --device cpu'.split()

# Runs the training tool; afterwards each process writes its state, unless all die in the second epoch.
SCRIPT = """
import os, runpy, sys, torch
from imagenet_overlock.train import Trainer

dies, seen = {dies!r}, {seen!r}
fit, update = Trainer.fit, Trainer._update

def fit_and_tell(self, writer=None):
    rows = fit(self, writer)
    torch.save([dict(self.model.state_dict()), dict(self.ema.module.state_dict())], seen + os.environ['RANK'])
    return rows

def update_or_die(self, batches):
    if dies and self.epoch == 1:
        # The first process is to have written its checkpoint: when one dies, torchrun ends the others.
        torch.distributed.barrier()
        os._exit(9)
    return update(self, batches)

Trainer.fit, Trainer._update = fit_and_tell, update_or_die
sys.argv[0] = {train!r}
runpy.run_path(sys.argv[0], run_name='__main__')
"""


# Saves the weights after three updates with fixed images, of which each process has a share.
SHARES = """
import sys, torch
from imagenet_overlock import Recipe
from imagenet_overlock.train import Trainer, train

def fit(self, writer=None):
    rank, size = self.world.rank, self.world.size
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3, 64, 64), torch.randint(2, (4,))) for _ in range(3)]
    batches = iter([(images[rank::size], classes[rank::size]) for images, classes in batches])
    self.parallel.train()
    for _ in range(3):
        self._update(batches)
    torch.save(dict(self.model.state_dict()), f'{sys.argv[2]}/{size}-{rank}.pth')

Trainer.fit = fit
# Not AdamW: it makes a whole step of a gradient that is zero but for rounding.
settings = dict(opt='sgd', lr=0.05, min_lr=0.0, mixup=0.0, cutmix=0.0, amp=False)
recipe = Recipe(model='overlock_tiny', img_size=64, warmup_epochs=0, batch_size=2, workers=0, **settings)
train(recipe, sys.argv[1], sys.argv[2] + '/run', device='cpu')
"""


@pytest.fixture(scope='module')
def two_classes(tmp_path_factory, drawn):
    """Two classes of the drawn folder, with five images to validate on."""
    root = tmp_path_factory.mktemp('two')
    for split in ('train', 'val'):
        for name in ('dots', 'stars'):
            (root / split / name).mkdir(parents=True)
            for path in (drawn / 'train' / name).iterdir():
                (root / split / name / path.name).symlink_to(path)
    (root / 'val' / 'dots' / 'more.png').symlink_to(drawn / 'val' / 'dots' / '0000.png')
    return root


@pytest.fixture
def call_tool(monkeypatch):
    """Run a tool in this process, without the log handlers that another one added."""

    def call(tool, *args):
        for name in ('imagenet_overlock', 'overlock'):
            monkeypatch.setattr(logging.getLogger(name), 'handlers', [])
        monkeypatch.setattr(sys, 'argv', [str(tool), *map(str, args)])
        try:
            runpy.run_path(str(tool), run_name='__main__')
        except SystemExit as end:
            if end.code:
                raise

    return call


@pytest.mark.slow
def test_training_resuming_and_validating_from_the_command_line(two_classes, call_tool, capsys, tmp_path):
    output = tmp_path / 'run'
    command = [TRAIN, two_classes, *TINY, '-b', 2, '-j', 0, '--output', output]
    call_tool(*command)
    log = capsys.readouterr().err
    assert 'epoch 2/2: train_loss ' in log and 'val_aux_top1 ' in log and 'ETA 0:00:00' in log
    call_tool(*command, '--epochs', 3, '--resume')
    log = capsys.readouterr().err
    assert 'epoch 3/3' in log and 'epoch 2/3' not in log
    with (output / 'summary.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['epoch'] for row in rows] == ['0', '1', '2']
    results, confusion = tmp_path / 'results.json', tmp_path / 'confusion.png'
    files = ['--confusion', confusion, '--results', results]
    call_tool(VALIDATE, two_classes, '--checkpoint', output / 'last.pth', '--aux', '-j', 0, '-b', 2, *files)
    told = capsys.readouterr().out
    assert 'auxiliary head: top-1 ' in told and 'images/s' in told
    assert json.loads(results.read_text())['top1'] == float(rows[2]['val_top1'])
    assert confusion.stat().st_size > 1000


@pytest.mark.slow
def test_two_processes_train_resume_and_validate(two_classes, run_tool, tmp_path):
    """Five validation images do not divide by two: neither is one left out nor counted twice."""

    def run(output, *args, dies=False):
        script = tmp_path / 'script.py'
        script.write_text(SCRIPT.format(dies=dies, seen=str(tmp_path / output), train=str(TRAIN)))
        return run_tool(script, two_classes, *TINY, '-b', 2, '-j', 0, '--output', tmp_path / output, *args, processes=2)

    whole = run('whole')
    assert whole.returncode == 0, whole.stderr
    assert whole.stderr.count('epoch 2/2: train_loss ') == 1
    content = read_checkpoint(tmp_path / 'whole' / 'last.pth')
    assert content['processes'] == 2
    for rank in (0, 1):
        model, average = torch.load(tmp_path / f'whole{rank}', weights_only=True)
        torch.testing.assert_close(model, dict(content['state_dict']), rtol=0, atol=0)
        torch.testing.assert_close(average, dict(content['state_dict_ema']), rtol=0, atol=0)

    assert run('killed', dies=True).returncode != 0
    assert read_checkpoint(tmp_path / 'killed' / 'last.pth')['epoch'] == 0
    resumed = run('killed', '--resume')
    assert resumed.returncode == 0, resumed.stderr
    for name in ('state_dict', 'state_dict_ema', 'optimizer'):
        torch.testing.assert_close(
            read_checkpoint(tmp_path / 'killed' / 'last.pth')[name], content[name], rtol=0, atol=0
        )

    path = tmp_path / 'two.json'
    options = ['--ema', '--aux', '-j', 0, '-b', 2, '--results', path, '--confusion', path.with_suffix('.csv')]
    last = tmp_path / 'whole' / 'last.pth'
    done = run_tool(VALIDATE, two_classes, '--checkpoint', last, *options, '--device', 'cpu', processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('top-1') == 2
    two = json.loads(path.read_text())
    settings = dict(checkpoint=str(last), ema=True, aux=True, batch_size=2, workers=0, device='cpu')
    one = validate(two_classes, confusion=tmp_path / 'one.csv', **settings).figures
    assert path.with_suffix('.csv').read_text() == (tmp_path / 'one.csv').read_text()
    assert one['images'] == two['images'] == 5
    for name in ('top1', 'top5', 'aux_top1', 'aux_top5'):
        assert one[name] == two[name] == content['history'][-1][f'val_ema_{name}']
    assert one['loss'] == pytest.approx(two['loss'], rel=1e-6)


@pytest.mark.slow
def test_two_processes_with_half_the_images_each_learn_what_one_learns_of_all(two_classes, run_tool, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(SHARES)
    for processes in (1, 2):
        done = run_tool(script, two_classes, tmp_path, processes=processes)
        assert done.returncode == 0, done.stderr
    one, *two = (torch.load(tmp_path / f'{name}.pth', weights_only=True) for name in ('1-0', '2-0', '2-1'))
    for weights in two:
        torch.testing.assert_close(weights, one, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ('tool', 'args', 'sentence'),
    [
        (TRAIN, ['absent'], 'The image folder absent does not exist; expected train/CLASS/*.jpg'),
        (TRAIN, ['absent', '--epochs', '0'], 'The setting epochs must be at least 1, got 0.'),
        (TRAIN, ['absent', '-c', 'absent.yaml'], 'The recipe absent.yaml cannot be read'),
        (VALIDATE, ['absent', '--model', 'overlock_xt', '--pretrained'], 'The image folder absent does not exist; '),
        (VALIDATE, ['absent', '--checkpoint', 'a.pth', '-b', '0'], 'The setting batch_size must be at least 1, got 0.'),
    ],
)
def test_a_mistake_is_one_sentence_and_code_2(monkeypatch, call_tool, capsys, tmp_path, tool, args, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        call_tool(tool, *args)
    assert end.value.code == 2
    *before, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith(sentence)
    assert not [line for line in before if 'checkpoints and figures' not in line]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_missing_folder_is_told_once_by_two_processes(run_tool, tmp_path):
    done = run_tool(TRAIN, 'absent', '--device', 'cpu', '--output', tmp_path / 'run', processes=2)
    assert done.returncode != 0
    assert done.stderr.count('The image folder absent does not exist') == 1


@pytest.mark.slow
def test_the_package_imports_nothing_of_openmmlab():
    code = (
        'import sys, imagenet_overlock.train, imagenet_overlock.validate, demo.classifier\n'
        'print([name for name in sys.modules if name.split(".")[0] in ("mmengine", "mmcv", "mmdet", "mmseg")])'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tiny.ROOT)
    assert done.stdout.strip() == '[]', done.stderr
