"""Classes against those of training, of the file, of the heads and of the checkpoint, in every split."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
from torch import nn

from mmengine_overlock.data import check_data
from mmengine_overlock.data.classes import find_misspelt
from mmengine_overlock.hooks import WholeModelHook
from overlock.utils.errors import CheckpointError, UserError
from tests.mmengine_overlock.data_sets import CLASSES, write_coco, write_maps


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('OVERLOCK_CACHE', str(tmp_path / 'cache'))


def write(kind, folder, split):
    """Write a data set for a split beside the same one for training; its configuration and settings."""
    folder.mkdir()
    cfg = dict(coco=write_coco, maps=write_maps)[kind](folder)
    dataset = cfg.train_dataloader.dataset.get('dataset', cfg.train_dataloader.dataset)
    if split == 'train':
        return cfg, dataset
    cfg[f'{split}_dataloader'] = dict(dataset=deepcopy(dataset))
    cfg[f'{split}_evaluator'] = deepcopy(cfg.get('train_evaluator', dict(type='IoUMetric')))
    return cfg, cfg[f'{split}_dataloader'].dataset


def set_metainfo(**metainfo):
    return lambda cfg, dataset: dataset.metainfo.update(metainfo)


def forget(cfg, dataset):
    del dataset['metainfo']


def set_heads(count):
    def change(cfg, dataset):
        for heads in (cfg.model, cfg.model.get('roi_head', {})):
            for name in {'bbox_head', 'decode_head'} & heads.keys():
                heads[name].num_classes = count

    return change


def lose_a_class(cfg, dataset):
    dataset.metainfo.classes = ('cat', 'dog')
    cfg.model = {}


# Mistake -> kind of data, what makes it, and the words that name it.
MISTAKES = {
    'misspelt': ('coco', set_metainfo(classes=('cat', 'dgo', 'bird')), 'dgo (dog in the file)'),
    'string': (
        'coco',
        set_metainfo(classes=('dog')),  # noqa: UP034
        "the string 'dog' as classes; set metainfo = dict(classes=('dog',))",
    ),
    'string of several': ('coco', set_metainfo(classes='cat, dog'), "dict(classes=('cat', 'dog'))"),
    'forgotten': ('coco', forget, 'bbox_head with num_classes=3 for the 80 of CocoDataset, as metainfo names none'),
    'heads': ('coco', set_heads(80), 'bbox_head with num_classes=80 for 3'),
    'palette': ('coco', set_metainfo(palette=[(0, 0, 0)]), 'a palette of 1 colors for 3 classes'),
    'string for maps': ('maps', set_metainfo(classes='dog'), "dict(classes=('dog',))"),
    'forgotten for maps': ('maps', forget, 'no classes; set metainfo = dict(classes=(...)) in the order of the values'),
    'heads for maps': ('maps', set_heads(2), 'decode_head with num_classes=2 for 3'),
    'values for maps': ('maps', lose_a_class, '1.png (3)'),
    'palette for maps': ('maps', set_metainfo(palette=[(0, 0, 0)]), 'a palette of 1 colors for 3 classes'),
    'names of another data set for maps': (
        'maps',
        lambda cfg, dataset: dataset.update(type='ADE20KDataset'),
        "classes that ADE20KDataset does not have: cat, dog, bird; set type='BaseSegDataset'",
    ),
}


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes_in_classes_are_named_before_the_first_step(mistake, split, tmp_path):
    kind, make, words = MISTAKES[mistake]
    cfg, dataset = write(kind, tmp_path / 'data', split)
    make(cfg, dataset)
    with pytest.raises(UserError, match=f'^The {split} data set cannot be used: ') as caught:
        check_data(cfg, split)
    assert words in str(caught.value) and '\n' not in str(caught.value)


def test_the_names_of_the_file_are_offered_where_metainfo_is_forgotten(tmp_path):
    cfg, dataset = write('coco', tmp_path / 'data', 'train')
    del dataset['metainfo']
    path = tmp_path / 'data' / 'annotations' / 'a.json'
    path.write_text(path.read_text().replace('"dog"', '"fox"'))
    offered = (
        r"the 80 classes are those of CocoDataset, without fox; set metainfo = dict\(classes=\('bird', 'cat', 'fox'\)\)"
    )
    with pytest.raises(UserError, match=offered):
        check_data(cfg, 'train')


@pytest.mark.parametrize('split', ['val', 'test'])
@pytest.mark.parametrize('kind', ['coco', 'maps'])
def test_another_order_than_in_training_is_refused(kind, split, tmp_path):
    cfg, dataset = write(kind, tmp_path / 'data', split)
    dataset.metainfo.classes = ('dog', 'cat', 'bird')
    with pytest.raises(UserError, match=r'another label than in training \(2\): dog \(0 instead of 1\), cat \(1 inst'):
        check_data(cfg, split)


def test_another_name_than_in_training_is_told(tmp_path):
    cfg, dataset = write('maps', tmp_path / 'data', 'val')
    dataset.metainfo.classes = ('cat', 'dog', 'Vogel')
    (finding,) = check_data(cfg, 'train', 'val')['val']
    assert (finding.kind, finding.outcome, finding.items) == ('renamed', 'told', ['Vogel for bird'])


def test_absent_and_unknown_classes_are_told_by_name(tmp_path):
    cfg, dataset = write('coco', tmp_path / 'data', 'train')
    dataset.metainfo.classes = ('cat', 'horse', 'bird')
    findings = {finding.kind: finding for finding in check_data(cfg, 'train')['train']}
    assert findings['absent'].items == ['horse'] and findings['unknown'].items == ['dog']
    assert findings['unlabeled'].items == ['2.jpg'] and 'unseen' not in findings
    assert findings['absent'].brief().endswith('(1): horse') and findings['unlabeled'].brief().endswith('a class (1)')


@pytest.mark.parametrize(
    ('absent', 'unknown', 'found'),
    [
        (['bycicle'], ['car', 'bicycle'], ['bycicle (bicycle in the file)']),
        (['Katze', 'Hund'], ['katze '], ['Katze (katze  in the file)']),
        (['H\u00e4hne'], ['Ha\u0308hne'], ['H\u00e4hne (Ha\u0308hne in the file)']),
        (['собака'], ['сабака'], ['собака (сабака in the file)']),
        (['dog'], ['hot dog', 'person'], []),
        (['猫'], ['犬'], []),
    ],
)
def test_similar_names_are_found_in_any_language(absent, unknown, found):
    assert find_misspelt(absent, unknown) == found


@pytest.mark.parametrize('several', [False, True])
def test_evaluators_with_the_file_of_other_images_are_refused(several, tmp_path):
    cfg, dataset = write('coco', tmp_path / 'data', 'test')
    path = tmp_path / 'data' / 'annotations' / 'a.json'
    other = path.with_name('b.json')
    other.write_text(path.read_text().replace('.jpg', '_other.jpg'))
    cfg.test_evaluator.ann_file = str(other)
    if several:
        cfg.test_evaluator = [cfg.test_evaluator, dict(cfg.test_evaluator, metric='bbox')]
    with pytest.raises(UserError, match='b.json has other images under 3 of 3 ids, first 1_other.jpg for 1.jpg'):
        check_data(cfg, 'test')


def load(meta, classes):
    model = nn.Linear(1, 1)
    visualizer = SimpleNamespace(dataset_meta=dict(classes=classes))
    runner = SimpleNamespace(model=model, visualizer=visualizer, _load_from='a.pth')
    WholeModelHook().after_load_checkpoint(runner, dict(state_dict=model.state_dict(), meta=meta))


@pytest.mark.parametrize('meta', [dict(dataset_meta=dict(classes=CLASSES)), dict(CLASSES=CLASSES)])
def test_a_checkpoint_of_classes_in_another_order_is_refused(meta):
    load(meta, CLASSES)
    with pytest.raises(CheckpointError, match=r'a.pth was trained on other classes.*bird \(0 instead of 2\)'):
        load(meta, CLASSES[::-1])


def test_a_checkpoint_of_other_names_is_told(monkeypatch):
    told = []
    monkeypatch.setattr('mmengine_overlock.hooks.print_log', lambda message, *arguments: told.append(message))
    load(dict(dataset_meta=dict(classes=CLASSES)), ('cat', 'Hund', 'bird'))
    assert len(told) == 1 and 'Hund for dog' in told[0]
    load({}, CLASSES)
    assert len(told) == 1
