"""What machines lack costs an ImageNet training no checkpoint, and is told in one sentence, first where it can be."""

import pytest
import torch

from imagenet_overlock.checkpoints import read_checkpoint
from imagenet_overlock.train import Trainer, train
from imagenet_overlock.validate import validate
from overlock.utils.distributed import exit_on_user_error
from overlock.utils.errors import UserError


def told(capsys, call):
    with pytest.raises(SystemExit) as end, exit_on_user_error():
        call()
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_costs_no_checkpoint(recipe, drawn, disk, monkeypatch, capsys):
    update, output = Trainer._update, disk.folder / 'run'

    def fill_then_update(self, batches):
        if self.epoch == 1 and not disk.filled:
            disk.fill(2**17)
        return update(self, batches)

    monkeypatch.setattr(Trainer, '_update', fill_then_update)
    settings = recipe(epochs=2, warmup_epochs=0)
    sentence = told(capsys, lambda: train(settings, drawn, output, device='cpu'))
    assert sentence.startswith('The disk is full; ')
    assert read_checkpoint(output / 'last.pth')['epoch'] == 0
    assert {path.name for path in output.iterdir()} == {'last.pth', 'best.pth', 'summary.csv'}
    disk.free()
    train(settings, drawn, output, 'auto', device='cpu')
    train(settings, drawn, output.with_name('whole'), device='cpu')
    ours, whole = (read_checkpoint(folder / 'last.pth') for folder in (output, output.with_name('whole')))
    torch.testing.assert_close(ours['state_dict'], whole['state_dict'], rtol=0, atol=0)


@pytest.mark.parametrize('option', ['output', 'confusion', 'results'])
def test_outputs_that_cannot_be_written_are_told_first(recipe, drawn, disk, monkeypatch, option):
    folder = disk.protect()
    monkeypatch.setattr(Trainer, '__init__', lambda *_, **__: pytest.fail('the training began'))
    with pytest.raises(UserError, match=f'^{folder}/a.* cannot be written .*; give a path in a writable folder'):
        if option == 'output':
            train(recipe(), drawn, folder / 'a', device='cpu')
        else:
            validate(drawn, 'overlock_tiny', 'absent.pth', **{option: folder / 'a.csv'})


def test_too_little_memory_is_told_with_what_to_lower(recipe, drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, '_update', lambda *_: torch.empty(2**50))
    sentence = told(capsys, lambda: train(recipe(), drawn, tmp_path / 'run', device='cpu'))
    assert sentence.startswith('The memory does not suffice; lower the batch size, ')
    assert '--grad-checkpointing' in sentence


def test_folders_and_classes_may_have_names_of_every_script(recipe, drawn, tmp_path):
    folder, names = tmp_path / 'Übung 学習', ['my class', 'größer', '猫', "🦉's"]
    for split in ('train', 'val'):
        (folder / split).mkdir(parents=True)
        for name, given in zip(names, sorted((drawn / split).iterdir()), strict=False):
            (folder / split / name).symlink_to(given)
    output, results = folder / 'run', [folder / 'ö.csv', folder / '絵.png', folder / 'ö.json']
    train(recipe(epochs=1, batch_size=4, warmup_epochs=0), folder, output, device='cpu')
    for path in results[:2]:
        found = validate(
            folder, checkpoint=output / 'last.pth', confusion=path, results=results[2], workers=0, device='cpu'
        )
    assert set(found.classes) == set(names) and all(path.stat().st_size for path in results)
    assert set(names) < set(results[0].read_text(encoding='utf-8').replace('\n', ',').split(','))
