import json
import os
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from mmengine_overlock.data import check_data, files
from mmengine_overlock.data.findings import KINDS, Finding, group
from mmengine_overlock.data.samples import BrokenFileError, SampleError, name_samples
from overlock.utils.errors import UserError
from tests.mmengine_overlock.data_sets import write_coco, write_image, write_maps
from tests.testing import ROOT

DATA = Path(os.environ.get('OVERLOCK_DATA', 'not set'))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('OVERLOCK_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache' / 'data'


@pytest.fixture
def coco(tmp_path):
    """A configuration and a folder of three images in COCO's layout."""
    return write_coco(tmp_path)


@pytest.fixture
def ade(tmp_path):
    """A configuration and a folder of three images in ADE20K's layout."""
    cfg = write_maps(tmp_path)
    dataset = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(
        type='ADE20KDataset', data_root=dataset.data_root, data_prefix=dataset.data_prefix
    )
    cfg.model = {}
    return cfg


def edit(tmp_path, **changes):
    path = tmp_path / 'annotations' / 'a.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_whole_data_sets_pass(coco, tmp_path):
    check_data(coco, 'train', 'val')


def test_whole_segmentation_sets_pass(ade):
    check_data(ade, 'train', 'val')


@pytest.mark.parametrize(
    'damage, reason',
    [
        (lambda root: (root / 'annotations' / 'a.json').unlink(), 'a.json does not exist'),
        (lambda root: (root / 'annotations' / 'a.json').write_text(''), 'a.json is not JSON'),
        (lambda root: (root / 'annotations' / 'a.json').write_text('{'), 'a.json is not JSON'),
        (lambda root: (root / 'annotations' / 'a.json').write_text('[]'), 'a.json has no images'),
        (lambda root: edit(root, images=[]), 'a.json has no images'),
        (lambda root: edit(root, annotations=[]), 'a.json has no annotations'),
        (lambda root: edit(root, categories=[]), 'a.json has no categories'),
        (
            lambda root: [path.unlink() for path in (root / 'train').iterdir()],
            '1.jpg, the first image of a.json, is not in',
        ),
        (lambda root: (root / 'train').rename(root / 'other'), 'train does not exist'),
    ],
)
def test_coco_damage_is_one_sentence_with_the_layout(coco, tmp_path, damage, reason):
    damage(tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        check_data(coco, 'train')
    message = str(caught.value)
    assert "annotations/a.json in COCO's format and its images in train/" in message and '--data-root' in message
    assert '\n' not in message


def test_categories_that_the_data_set_does_not_know_are_refused(coco, tmp_path):
    coco.model = coco.train_dataloader.dataset.dataset.metainfo = {}
    edit(tmp_path, categories=[dict(id=1, name='shape')])
    with pytest.raises(UserError, match=r'no category of .*a.json \(shape\) is one of its classes \(person, '):
        check_data(coco, 'train')
    coco.train_dataloader.dataset.dataset.metainfo = dict(classes=('shape',))
    check_data(coco, 'train')


def test_annotations_may_lack_where_only_predictions_are_written(coco, tmp_path):
    edit(tmp_path, annotations=[])
    coco.test_dataloader = coco.train_dataloader
    coco.test_evaluator = dict(type='CocoMetric', format_only=True)
    check_data(coco, 'test')


def test_an_evaluator_without_its_file_is_refused(coco, tmp_path):
    coco.train_evaluator = dict(type='CocoMetric', ann_file=str(tmp_path / 'b.json'))
    with pytest.raises(UserError, match='annotation file .*b.json of train_evaluator does not exist'):
        check_data(coco, 'train')


@pytest.mark.parametrize(
    'damage, reason',
    [
        (lambda root: (root / 'images' / 'training').rename(root / 'images' / 'x'), 'images/training does not exist'),
        (lambda root: (root / 'annotations' / 'training').rename(root / 'x'), 'annotations/training does not exist'),
        (
            lambda root: [path.unlink() for path in (root / 'images' / 'training').iterdir()],
            r'images/training has no images \*.jpg',
        ),
        (
            lambda root: (root / 'annotations' / 'training' / '1.png').unlink(),
            '1 of 3 images have no label map, first 1.jpg',
        ),
    ],
)
def test_ade_damage_is_one_sentence_with_the_layout(ade, tmp_path, damage, reason):
    damage(tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        check_data(ade, 'train')
    message = str(caught.value)
    assert 'images/training/*.jpg and, by the same names, label maps annotations/training/*.png' in message
    assert '\n' not in message


def test_the_suffixes_of_the_data_set_count(ade, tmp_path):
    ade.train_dataloader.dataset.update(img_suffix='.tif', seg_map_suffix='_labels.png')
    for number in (1, 2, 3):
        write_image(tmp_path / 'images' / 'training' / f'{number}.tif', format='TIFF')
        path = tmp_path / 'annotations' / 'training' / f'{number}.png'
        path.rename(path.with_name(f'{number}_labels.png'))
    check_data(ade, 'train')


def test_data_sets_of_other_kinds_are_left_to_their_class():
    check_data(Config(dict(train_dataloader=dict(dataset=dict(type='ToyDataset')))), 'train', 'val')


def test_data_sets_with_a_reader_of_their_own_are_checked_for_files_alone(coco, tmp_path):
    dataset = coco.train_dataloader.dataset.dataset
    dataset.update(type='LVISV1Dataset', metainfo=dict(classes=('cat',)))
    assert check_data(coco, 'train') == dict(train=[])
    (tmp_path / 'annotations' / 'a.json').write_text('{')
    with pytest.raises(UserError, match='is not JSON'):
        check_data(coco, 'train')


def test_all_splits_are_told_in_one_message(coco, tmp_path):
    coco.val_dataloader = Config(dict(dataset=dict(coco.train_dataloader.dataset.dataset))).to_dict()
    (tmp_path / 'train' / '2.jpg').unlink()
    with pytest.raises(UserError, match='The train data set cannot.* The val data set cannot') as caught:
        check_data(coco, 'train', 'val')
    assert '\n' not in str(caught.value)


def test_a_second_check_reads_no_file_until_one_changes(coco, tmp_path, monkeypatch):
    edit(tmp_path, categories=[dict(id=n, name=name) for n, name in ((3, 'bird'), (2, 'dog'), (1, 'cat'))])
    again, changed = Config(coco.to_dict()), Config(coco.to_dict())
    first = check_data(coco, 'train')
    read = []
    monkeypatch.setattr(files, 'read_image', lambda *arguments, **options: read.append(arguments))
    assert check_data(again, 'train') == first and not read
    assert [finding.kind for finding in first['train']] == ['order']
    copy = again.train_dataloader.dataset.dataset.ann_file
    assert copy == coco.train_dataloader.dataset.dataset.ann_file == again.train_evaluator.ann_file
    monkeypatch.undo()
    monkeypatch.setenv('OVERLOCK_CACHE', str(tmp_path / 'cache'))
    (tmp_path / 'train' / '2.jpg').write_bytes(b'')
    with pytest.raises(UserError, match='2.jpg is empty'):
        check_data(changed, 'train')


def test_a_lost_copy_is_written_again(coco, tmp_path):
    edit(tmp_path, categories=[dict(id=n, name=name) for n, name in ((3, 'bird'), (2, 'dog'), (1, 'cat'))])
    again = Config(coco.to_dict())
    check_data(coco, 'train')
    copy = Path(coco.train_dataloader.dataset.dataset.ann_file)
    copy.unlink()
    check_data(again, 'train')
    assert [category['name'] for category in json.loads(copy.read_text())['categories']] == ['cat', 'dog', 'bird']


def test_without_a_cache_folder_the_work_folder_keeps_the_outcome(coco, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('OVERLOCK_CACHE', str(tmp_path / 'file'))
    check_data(coco, 'train')
    assert list((tmp_path / 'work' / 'data_check').glob('*.json'))


def test_processes_check_once(coco, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr('mmengine_overlock.data.coco.read_images', lambda *a: calls.append(a) or files.read_images(*a))
    monkeypatch.setenv('RANK', '1')
    coco.launcher = 'pytorch'
    edit(tmp_path, images=json.loads((tmp_path / 'annotations' / 'a.json').read_text())['images'] * 2)
    other = Config(coco.to_dict())
    check_data(coco, 'train')
    # Only the first process writes.
    assert not (tmp_path / 'work' / 'data_check.txt').exists()
    monkeypatch.setenv('RANK', '0')
    check_data(other, 'train')
    assert len(calls) == 1 and (tmp_path / 'work' / 'data_check.txt').exists()
    assert other.train_dataloader == coco.train_dataloader


def test_what_takes_too_long_is_left_unread_and_told(coco, monkeypatch):
    monkeypatch.setattr(files, 'TIME_LIMIT', -1.0)
    (finding,) = check_data(coco, 'train')['train']
    assert (finding.kind, finding.items) == ('unread', ['3 of 3'])


def test_folders_in_a_circle_are_scanned_once(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'b').symlink_to(tmp_path)
    (tmp_path / 'a' / '1.jpg').write_bytes(b'123')
    assert {name: size for name, (size, _) in files.scan(tmp_path).items()} == {'a/1.jpg': 3}


def test_findings_are_records():
    assert group(dict(over=['1.jpg'], missing=['2.jpg', '3.jpg'], size=[])) == [
        Finding('missing', 'refused', KINDS['missing'][1], ['2.jpg', '3.jpg']),
        Finding('over', 'told', KINDS['over'][1], ['1.jpg']),
    ]


@pytest.mark.parametrize('damage, workers', [('lost', 0), ('empty', 0), ('cut off', 1)])
def test_a_file_that_breaks_while_training_is_named_in_one_sentence(coco, tmp_path, damage, workers):
    check_data(coco, 'train')
    name_samples()
    path = tmp_path / 'train' / '2.jpg'
    content = path.read_bytes()
    path.unlink()
    if damage != 'lost':
        path.write_bytes(content[: len(content) // 2] if damage == 'cut off' else b'')
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(coco.train_dataloader.dataset.dataset)
    with pytest.raises(BrokenFileError) as caught:
        list(torch.utils.data.DataLoader(dataset, None, num_workers=workers))
    assert str(caught.value).startswith(f'{path} ') and '\n' not in str(caught.value)


def test_a_transform_that_fails_names_the_image(coco, tmp_path):
    name_samples()
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(coco.train_dataloader.dataset.dataset)
    dataset.pipeline.transforms.insert(1, lambda results: results['nothing'])
    with pytest.raises(SampleError, match="/train/1.jpg: KeyError: 'nothing'"):
        dataset[0]


@pytest.mark.skipif(not DATA.is_dir(), reason='OVERLOCK_DATA names no folder')
@pytest.mark.parametrize(
    'name, data', [('mask_rcnn_overlock_xt_1x', 'coco_tiny'), ('upernet_overlock_xt_160k', 'ade_tiny')]
)
def test_photographs_with_labels_pass_and_are_left_as_they_are(name, data, tmp_path):
    from mmengine_overlock.config import set_data_root

    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    set_data_root(cfg, DATA / data)
    cfg.work_dir = str(tmp_path)
    before = cfg.to_dict()
    findings = check_data(cfg, 'train', 'val', 'test')
    assert {finding.outcome for records in findings.values() for finding in records} <= {'told'}
    assert cfg.to_dict() == before


@pytest.mark.parametrize('options, checks', [((), 1), (('--no-check',), 0)])
def test_no_check_starts_without(options, checks, write_toy, run_tool, monkeypatch):
    calls = []
    monkeypatch.setattr('mmengine_overlock.run.check_data', lambda *arguments: calls.append(arguments))
    code, _, err = run_tool('train', write_toy(), *options)
    assert code == 0, err
    assert len(calls) == checks
