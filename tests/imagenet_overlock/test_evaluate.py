"""Validation: counts against naive ones, confusion, and the files and sentences of the tool."""

import csv
import json
import re
import shutil

import pytest
import torch
from PIL import Image
from torch import nn

from imagenet_overlock import Recipe
from imagenet_overlock.confusion import confused_pairs, worst_classes, write_confusion
from imagenet_overlock.data import val_loader
from imagenet_overlock.distributed import World
from imagenet_overlock.evaluate import count_hits, evaluate
from imagenet_overlock.folder import check_validation_folder
from imagenet_overlock.model import both_logits, create_model
from imagenet_overlock.train import train
from imagenet_overlock.validate import validate
from overlock.checkpoint import WEIGHTS, CheckpointError
from overlock.utils.errors import UserError
from tests.imagenet_overlock import tiny

CPU = World(torch.device('cpu'))


class Scripted(nn.Module):
    """Has its logits as images."""

    def __init__(self, classes, aux=False):
        super().__init__()
        self.num_classes = classes
        self.aux_head = (lambda overview: -overview) if aux else None

    def encode(self, images):
        return [None, None, None, images[..., 0, 0]], images[..., 0, 0]

    def forward_head(self, x):
        return x


@pytest.mark.parametrize('classes', [2, 7])
def test_counts_equal_naive_ones(classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, classes, generator=generator)
    targets = torch.randint(classes, (50,), generator=generator)
    batches = [(logits[i : i + 8, :, None, None], targets[i : i + 8]) for i in range(0, 50, 8)]
    figures, matrix = evaluate(Scripted(classes, aux=True), batches, CPU)

    def percent(scores, k):
        ranked = [sorted(range(classes), key=lambda c, row=row: -row[c])[:k] for row in scores.tolist()]
        return 100 * sum(target in first for target, first in zip(targets.tolist(), ranked, strict=True)) / 50

    assert figures['images'] == 50
    assert (figures['top1'], figures['top5']) == (percent(logits, 1), percent(logits, 5))
    assert (figures['aux_top1'], figures['aux_top5']) == (percent(-logits, 1), percent(-logits, 5))
    assert figures['loss'] == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)
    confusion = [[0] * classes for _ in range(classes)]
    for target, taken in zip(targets.tolist(), logits.argmax(1).tolist(), strict=True):
        confusion[target][taken] += 1
    assert matrix.tolist() == confusion


def test_fewer_than_five_classes_limit_top5():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    assert count_hits(logits, torch.tensor([0])).tolist() == [0, 1]
    assert count_hits(logits, torch.tensor([2])).tolist() == [1, 1]


def test_an_empty_share_counts_nothing():
    figures, matrix = evaluate(Scripted(3), [], CPU)
    assert figures == {'images': 0, 'loss': 0, 'top1': 0, 'top5': 0}
    assert not matrix.any()


def test_shares_of_processes_hold_every_image_once(drawn):
    model = tiny.TimmOverLoCK(tiny.ARCH, num_classes=10)
    split = check_validation_folder(drawn)
    whole, *shares = (
        torch.cat([images for images, _ in val_loader(split, world, model, 2, 0, 32)]).flatten(1)
        for world in (CPU, *(World(torch.device('cpu'), rank, 3) for rank in range(3)))
    )
    assert [len(share) for share in shares] == [4, 3, 3]
    assert sorted(torch.cat(shares).tolist()) == sorted(whole.tolist())


@pytest.mark.parametrize('workers', [0, 1])
def test_an_image_that_cannot_be_decoded_is_one_sentence(drawn, trained, tmp_path, workers):
    folder = tmp_path / 'val'
    shutil.copytree(drawn / 'val', folder)
    broken = next((folder / 'stars').iterdir())
    whole = broken.read_bytes()
    shutil.copy(broken, broken.with_name(f'a{broken.name}'))
    broken.with_name(f'z{broken.name}').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError) as caught:
        validate(folder, checkpoint=str(trained[0]), workers=workers)
    assert re.fullmatch(
        r'The image .*val/stars/z\S+ cannot be decoded \(.*\); replace or remove it.', str(caught.value)
    )


@pytest.mark.parametrize(
    ('settings', 'side'),
    [(dict(img_size=224), 246), (dict(img_size=384), 384), (dict(img_size=384, crop_pct=0.5), 768)],
)
def test_larger_images_are_validated_whole_unless_asked_otherwise(drawn, settings, side):
    model = tiny.TimmOverLoCK(tiny.ARCH, num_classes=10)
    # ImageNet preprocessing as XT has it.
    model.pretrained_cfg = dict(input_size=(3, 224, 224), crop_pct=0.91)
    loader = val_loader(check_validation_folder(drawn), CPU, model, 2, 0, **settings)
    assert loader.dataset.transform.transforms[0].size == side
    assert loader.dataset.transform(Image.new('RGB', (500, 400))).shape[-2:] == (settings['img_size'],) * 2


def test_both_logits_in_evaluation_are_those_of_training():
    torch.manual_seed(0)
    model = tiny.TimmOverLoCK(tiny.ARCH, num_classes=3, aux_head=True).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(both_logits(model, images), model(images))


CONFUSION = torch.tensor([[3, 1, 0], [2, 0, 2], [0, 0, 0]])
NAMES = ('a', 'b', 'c, d')


def test_confused_pairs_and_worst_classes():
    assert confused_pairs(CONFUSION, NAMES) == [('b', 'a', 2), ('b', 'c, d', 2), ('a', 'b', 1)]
    assert confused_pairs(CONFUSION, NAMES, 1) == [('b', 'a', 2)]
    assert worst_classes(CONFUSION, NAMES) == [('b', 0.0), ('a', 75.0)]


def test_confusion_files(tmp_path):
    write_confusion(tmp_path / 'a.csv', CONFUSION, NAMES)
    with (tmp_path / 'a.csv').open() as file:
        assert list(csv.reader(file)) == [
            ['true class', *NAMES],
            ['a', '3', '1', '0'],
            ['b', '2', '0', '2'],
            ['c, d', '0', '0', '0'],
        ]
    write_confusion(tmp_path / 'a.png', CONFUSION, NAMES)
    many = torch.eye(2000, dtype=torch.int64)
    write_confusion(tmp_path / 'b.png', many, tuple(map(str, range(2000))))
    for name in ('a.png', 'b.png'):
        with Image.open(tmp_path / name) as picture:
            assert 300 < min(picture.size) < 4000


@pytest.fixture(scope='module')
def trained(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    rows = train(
        Recipe(
            model='overlock_tiny',
            img_size=32,
            batch_size=10,
            workers=0,
            epochs=1,
            warmup_epochs=0,
            lr=1e-3,
            model_ema_decay=0.5,
            # As `validate` computes.
            amp=False,
        ),
        drawn,
        folder,
    )
    return folder / 'last.pth', rows[-1]


@pytest.mark.parametrize('ema', [False, True])
def test_validating_a_checkpoint_gives_the_figures_of_training(drawn, trained, tmp_path, ema):
    path, row = trained
    found = validate(
        drawn,
        checkpoint=str(path),
        ema=ema,
        aux=True,
        batch_size=3,
        workers=0,
        results=tmp_path / 'found.json',
        confusion=tmp_path / 'confusion.csv',
    )
    prefix = 'val_ema_' if ema else 'val_'
    expected = {name: row[f'{prefix}{name}'] for name in ('loss', 'top1', 'top5', 'aux_top1', 'aux_top5')}
    assert {name: found.figures[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    written = json.loads((tmp_path / 'found.json').read_text())
    assert (written['model'], written['img_size'], written['images']) == ('overlock_tiny', 32, 10)
    assert written['top1'] == found.figures['top1']
    assert (tmp_path / 'confusion.csv').read_text().count('\n') == 11


def test_a_part_of_the_classes_is_validated_by_their_names(drawn, trained, tmp_path):
    (tmp_path / 'stars').symlink_to(drawn / 'val' / 'stars')
    found = validate(tmp_path, checkpoint=str(trained[0]), workers=0)
    assert found.figures['images'] == 1
    assert found.confusion.sum(1).tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]


def test_a_training_checkpoint_is_validated_in_the_deploy_form(drawn, trained, monkeypatch):
    plain = validate(drawn, checkpoint=str(trained[0]), workers=0)
    create = tiny.overlock_tiny
    monkeypatch.setattr(
        'imagenet_overlock.model.create_model',
        lambda name, classes, aux: create(num_classes=classes, aux_head=aux, deploy=True),
    )
    folded = validate(drawn, checkpoint=str(trained[0]), workers=0)
    assert folded.figures['loss'] == pytest.approx(plain.figures['loss'], rel=1e-5)


def test_classes_that_a_checkpoint_does_not_know_are_one_sentence(drawn, trained, tmp_path):
    (tmp_path / 'hexagons').symlink_to(drawn / 'val' / 'stars')
    with pytest.raises(UserError, match='has the class hexagons, which .*last.pth was not trained on'):
        validate(tmp_path, checkpoint=str(trained[0]), workers=0)


def test_weights_of_other_classes_are_one_sentence(drawn, tmp_path):
    torch.save(tiny.TimmOverLoCK(tiny.ARCH, num_classes=1000).state_dict(), tmp_path / 'in1k.pth')
    with pytest.raises(CheckpointError, match='has 1000 classes, but the image folder has 10; give the folder'):
        validate(drawn, 'overlock_tiny', str(tmp_path / 'in1k.pth'), workers=0)
    with pytest.raises(UserError, match='The weights do not tell their model; name it with --model'):
        validate(drawn, checkpoint=str(tmp_path / 'in1k.pth'), workers=0)


def test_published_weights_are_found_where_they_are_stored(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv('OVERLOCK_WEIGHTS', str(tmp_path))
    torch.save(tiny.TimmOverLoCK('xt', num_classes=1000).state_dict(), tmp_path / 'overlock_xt_in1k_224.pth')
    with pytest.raises(CheckpointError, match='overlock_xt_in1k has 1000 classes, but the image folder has 10'):
        validate(drawn, 'overlock_xt', pretrained=True, workers=0)


@pytest.mark.parametrize(
    ('settings', 'sentence'),
    [
        (dict(), 'Give either --pretrained or --checkpoint FILE.'),
        (dict(pretrained=True), 'The weights do not tell their model; '),
        (dict(pretrained=True, model='overlock_xs'), 'There is no model overlock_xs; '),
        (dict(pretrained=True, model='moganet_t.in21k'), 'There is no model moganet_t.in21k; the models are '),
        (dict(checkpoint='absent.pth'), 'absent.pth does not exist'),
        (dict(pretrained=True, model='overlock_xt', img_size=16), 'The setting img_size must be at least 32, got 16.'),
        (dict(pretrained=True, model='overlock_xt', confusion='a.txt'), 'ends in .csv or .png, got a.txt.'),
    ],
)
def test_what_cannot_be_validated_is_one_sentence(drawn, settings, sentence):
    with pytest.raises(UserError) as error:
        validate(drawn, workers=0, **settings)
    assert sentence in str(error.value)


def test_an_auxiliary_head_that_is_not_there_is_one_sentence(drawn, tmp_path):
    torch.save(tiny.TimmOverLoCK(tiny.ARCH, num_classes=10).state_dict(), tmp_path / 'main.pth')
    with pytest.raises(CheckpointError, match='main.pth has no auxiliary head; leave out --aux'):
        validate(drawn, 'overlock_tiny', str(tmp_path / 'main.pth'), aux=True, workers=0)


def test_published_weights_by_name_are_validated_at_their_own_size(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv('OVERLOCK_WEIGHTS', str(tmp_path))
    model = create_model('moganet_tiny', num_classes=10, aux_head=False)
    torch.save(model.state_dict(), tmp_path / WEIGHTS['moganet_t_256_in1k'].url.rpartition('/')[2])
    seen = []
    monkeypatch.setattr('imagenet_overlock.validate.val_loader', lambda *args: seen.append(args) or val_loader(*args))
    found = validate(drawn, 'moganet_tiny', 'moganet_t_256_in1k', workers=0)
    assert found.img_size == 256 and found.figures['images'] == 10
    assert seen[0][5:7] == (256, 0.9)


def test_a_tag_of_timm_names_the_weights_and_their_size(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv('OVERLOCK_WEIGHTS', str(tmp_path))
    model = create_model('moganet_xt.in1k_256', num_classes=10, aux_head=False)
    torch.save(model.state_dict(), tmp_path / WEIGHTS['moganet_xt_256_in1k'].url.rpartition('/')[2])
    found = validate(drawn, 'moganet_xt.in1k_256', pretrained=True, workers=0)
    assert (found.weights, found.img_size) == ('moganet_xt_256_in1k', 256)
