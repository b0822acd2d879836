"""Predictions from a checkpoint, which carries its configuration, into files."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from mmengine_overlock.embedded import embedded_config
from mmengine_overlock.predict import Pictures, Predictor, build_model
from overlock.utils.errors import UserError
from tests.mmengine_overlock.test_deploy import CLASSES, CONFIGS
from tests.testing import randomise


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """Checkpoints of a small detector and segmenter, as mmengine's runner writes them."""
    folder = tmp_path_factory.mktemp('checkpoints')
    found = {}
    for name, text in CONFIGS.items():
        (folder / f'{name}.py').write_text(text)
        cfg = Config.fromfile(folder / f'{name}.py')
        torch.manual_seed(0)
        model = build_model(cfg)
        randomise(model.backbone)
        classes = CLASSES['classes'] if name == 'segmenter' else tuple(f'class {i}' for i in range(80))
        meta = dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=classes))
        found[name] = folder / f'{name}.pth'
        torch.save(dict(state_dict=model.state_dict(), meta=meta), found[name])
    return found


@pytest.fixture
def images(tmp_path):
    """Two images, one of them with another name than ASCII has, and a broken one."""
    folder = tmp_path / 'images'
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    Image.fromarray(pixels).save(folder / 'a.png')
    Image.fromarray(pixels[::-1]).save(folder / 'überholt 木.jpg')
    (folder / 'broken.jpg').write_bytes(b'no image')
    return folder


def test_a_detector_writes_coco_results_and_pictures(checkpoints, images, tmp_path, run_tool):
    options = ('--checkpoint', checkpoints['detector'], '--out', tmp_path / 'out', '--score', '0', '--batch', 2)
    code, out, err = run_tool('predict', images, *options)
    assert code == 1, err
    assert out.startswith('2 images predicted') and out.endswith(f'not readable:\n  {images}/broken.jpg\n')
    results = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert {result['file_name'] for result in results} == {str(images / 'a.png'), str(images / 'überholt 木.jpg')}
    first = results[0]
    assert first['category_name'] == f'class {first["category_id"]}' and first['segmentation']['size'] == [96, 128]
    assert {path.name for path in (tmp_path / 'out/pictures').iterdir()} == {'a.jpg', 'überholt 木.jpg'}
    predictor = Predictor(checkpoints['detector'], device='cpu')
    picture, sample = next(predictor.predict(images))
    expected = [result for result in results if result['image_id'] == 0]
    torch.testing.assert_close(sample.pred_instances.scores, torch.tensor([result['score'] for result in expected]))


def test_a_segmenter_writes_label_maps_and_their_names(checkpoints, images, tmp_path, run_tool):
    code, _, err = run_tool(
        'predict', images / '*.png', '--checkpoint', checkpoints['segmenter'], '--out', tmp_path / 'out'
    )
    assert code == 0, err
    labels = np.asarray(Image.open(tmp_path / 'out/labels/a.png'))
    _, sample = next(Predictor(checkpoints['segmenter'], device='cpu').predict(images / 'a.png'))
    assert np.array_equal(labels, sample.pred_sem_seg.data[0])
    assert json.loads((tmp_path / 'out/labels.json').read_text())['0'] == 'cat'


def test_images_of_one_name_get_files_of_their_own(checkpoints, images, tmp_path, run_tool):
    (tmp_path / 'a.jpg').write_bytes((images / 'a.png').read_bytes())
    given = (images / 'a.png', tmp_path / 'a.jpg', '--checkpoint', checkpoints['segmenter'], '--out', tmp_path / 'out')
    assert run_tool('predict', *given, '--no-pictures')[0] == 0
    assert {path.name for path in (tmp_path / 'out/labels').iterdir()} == {'a.png', 'a_2.png'}
    assert not (tmp_path / 'out/pictures').exists()


def test_a_video_becomes_a_video(checkpoints, tmp_path, run_tool):
    path = tmp_path / 'video.avi'
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'MJPG'), 10, (64, 48))
    for shade in (0, 100, 200):
        video.write(np.full((48, 64, 3), shade, np.uint8))
    video.release()
    assert (
        run_tool('predict', path, '--checkpoint', checkpoints['detector'], '--out', tmp_path / 'out', '--score', 0)[0]
        == 0
    )
    drawn = cv2.VideoCapture(str(tmp_path / 'out/pictures/video.mp4'))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    frames = {result['frame'] for result in json.loads((tmp_path / 'out/predictions.json').read_text())}
    assert frames == {0, 1, 2}


@pytest.mark.parametrize(
    ('old', 'new', 'said'),
    [
        ("type='MaskRCNN'", "type='os.system', command='touch canary'", "asks for 'os.system'"),
        ("type='FPN'", "type='mmengine.dump', obj=1, file='canary.json'", "asks for 'mmengine.dump'"),
        ("default_scope = 'mmdet'", "default_scope = __import__('os').system('touch canary')", 'more than values'),
        ("default_scope = 'mmdet'", "default_scope = 'stranger'", "got 'stranger'"),
        ("type='FPN'", "type='CameraMotionCompensation', warp_mode='open(1)'", 'CameraMotionCompensation'),
        ("type='FPN'", "type='FPN', _scope_='stranger'", '_scope_'),
        ("type='FPN'", "type=['FPN']", 'FPN'),
        ("type='LoadImageFromFile'", "type='subprocess.Popen', args=['touch', 'canary']", 'subprocess.Popen'),
    ],
)
def test_a_configuration_in_a_checkpoint_is_never_run(checkpoints, tmp_path, monkeypatch, old, new, said):
    monkeypatch.chdir(tmp_path)
    content = torch.load(checkpoints['detector'], weights_only=True)
    text = content['meta']['cfg']
    assert old in text
    content['meta']['cfg'] = text.replace(old, new)
    with pytest.raises(UserError, match=said):
        Predictor(_saved(content, tmp_path / 'a.pth'))
    assert not [*tmp_path.glob('canary*')]


def _saved(content, path):
    torch.save(content, path)
    return path


def test_a_checkpoint_without_a_configuration_says_so():
    with pytest.raises(UserError, match='a.pth carries no configuration; give the configuration'):
        embedded_config({'state_dict': {}}, 'a.pth')


def test_inputs_that_are_nothing_are_told(tmp_path):
    with pytest.raises(UserError, match='is no image, video'):
        Pictures([tmp_path])
