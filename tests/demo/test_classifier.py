"""The drawn image folder: the same for the same parameters, balanced, whole, and not to be told by color."""

import hashlib
from functools import partial

import numpy as np
import pytest

from demo import classifier
from demo.classifier import draw
from demo.drawing import IMAGE_CLASSES as CLASSES
from demo.drawing import draw_image
from imagenet_overlock.folder import check_folder
from overlock.utils.errors import UserError
from tests.imagenet_overlock import tiny
from tests.testing import ROOT


def digest(root):
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob('*.png')}


def test_the_same_parameters_give_the_same_balanced_folder(tmp_path):
    first = draw(tmp_path / 'first', train=2, val=1, size=32)
    assert digest(first) == digest(draw(tmp_path / 'second', train=2, val=1, size=32))
    train, val = check_folder(first)
    assert train.classes == CLASSES and len(CLASSES) == 10
    assert (train.images, val.images) == (20, 10)
    for split, count in (('train', 2), ('val', 1)):
        assert {len(list((first / split / name).iterdir())) for name in CLASSES} == {count}
    assert len(set(digest(first).values())) == 30
    assert digest(draw(tmp_path / 'third', train=2, val=1, size=32, seed=1)) != digest(first)


def test_a_folder_drawn_earlier_is_replaced(tmp_path):
    for count in (2, 1):
        root = draw(tmp_path / 'data', train=count, val=1, size=32)
        assert len(list(root.rglob('*.png'))) == 10 * (count + 1)


def test_other_files_are_not_overwritten(tmp_path):
    (tmp_path / 'mine.txt').write_text('')
    with pytest.raises(UserError, match='holds files that are of no demonstration'):
        draw(tmp_path)
    with pytest.raises(UserError, match='got train=0, val=40, size=96'):
        draw(tmp_path / 'new', train=0)
    assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']


def test_mean_colors_do_not_tell_the_classes_apart():
    means = {
        name: [np.asarray(draw_image(name, 32, np.random.default_rng((label, i)))).mean((0, 1)) for i in range(30)]
        for label, name in enumerate(CLASSES)
    }
    centers = {name: np.mean(values[:15], 0) for name, values in means.items()}
    hits = [
        min(centers, key=lambda other, value=value: np.linalg.norm(centers[other] - value)) == name
        for name, values in means.items()
        for value in values[15:]
    ]
    assert np.mean(hits) < 0.25


def test_a_demonstration_leaves_its_files_and_replaces_those_of_the_last(tmp_path, monkeypatch):
    assert tiny.overlock_tiny
    monkeypatch.setattr(classifier, 'draw', partial(draw, train=2, val=1, size=40))
    options = dict(model='overlock_tiny', img_size=32, batch_size=10, epochs=1)
    classifier.run_demo(ROOT / 'configs/imagenet/demo.yaml', tmp_path, options)
    (tmp_path / 'run' / 'of_the_last').touch()
    outcome = classifier.run_demo(ROOT / 'configs/imagenet/demo.yaml', tmp_path, options)
    assert not (tmp_path / 'run' / 'of_the_last').exists()
    assert all(path.stat().st_size for path in outcome.files.values())
    assert {path.name for path in tmp_path.iterdir()} == {'data', 'run'}
    told = str(outcome).splitlines()
    assert told[0] == 'Accuracy on the 10 validation images (%):'
    assert told[4].startswith(f'| last           | {outcome.score:.1f} ')
    assert told[6].startswith('| chance         | 10.0 ')
    assert told[-2].startswith('time:') and 'training' in told[-2]
    assert told[-1].startswith('top-1:') and told[-1].endswith(', target 80: NOT REACHED') and not outcome.reached
