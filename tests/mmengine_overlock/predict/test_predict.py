"""Predictions from a checkpoint, which carries its configuration, into files."""

import json
import logging
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from PIL import Image

from mmengine_overlock.embedded import embedded_config
from mmengine_overlock.predict import Picture, Pictures, Predictor
from mmengine_overlock.predict.answers import Answers
from overlock.utils.errors import UserError
from tests.mmengine_overlock.predict.conftest import blots


def test_a_detector_writes_coco_results_and_pictures(checkpoints, images, tmp_path, run_tool):
    options = ('--checkpoint', checkpoints['detector'], '--out', tmp_path / 'out', '--score', '0', '--batch', 2)
    code, out, err = run_tool('predict', images, *options)
    assert code == 1, err
    assert out.startswith('2 images predicted') and out.endswith(
        f'not readable:\n  {images}/broken.jpg: is not an image\n'
    )
    results = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert {result['file_name'] for result in results} == {str(images / 'a.png'), str(images / 'überholt 木.jpg')}
    first = results[0]
    assert first['category_name'] == f'class {first["category_id"]}' and first['segmentation']['size'] == [96, 128]
    assert {path.name for path in (tmp_path / 'out/pictures').iterdir()} == {'a.jpg', 'überholt 木.jpg'}
    predictor = Predictor(checkpoints['detector'], device='cpu')
    picture, sample = next(predictor.predict(images))
    expected = [result for result in results if result['image_id'] == 0]
    torch.testing.assert_close(sample.pred_instances.scores, torch.tensor([result['score'] for result in expected]))


def test_remarks_of_the_toolboxes_are_kept_from_the_user_and_those_on_kernels_are_not(
    checkpoints, small, recwarn, monkeypatch, caplog
):
    told = []
    monkeypatch.setattr('mmseg.models.segmentors.encoder_decoder.print_log', lambda text, **_: told.append(text))
    predictor = Predictor(checkpoints['segmenter'], device='cpu', batch=2)
    # Both are brought to one size.
    predictor([blots(64, 96), blots(128, 192)])
    cascade = Predictor(*small('cascade')[::-1], device='cpu')
    assert len(cascade([blots(64, 96)])[0].pred_instances)
    # Log files of earlier tests are closed by the garbage collector, which says so at any time.
    assert not [remark for remark in recwarn if remark.category is not ResourceWarning] and not told
    hook = predictor.model.backbone.register_forward_hook(
        lambda *_: logging.getLogger('overlock').warning('The ContMix backend fails')
    )
    predictor([blots(64, 96)])
    hook.remove()
    assert caplog.messages == ['The ContMix backend fails']


def test_a_segmenter_writes_label_maps_and_their_names(checkpoints, images, tmp_path, run_tool):
    code, _, err = run_tool(
        'predict', images / '*.png', '--checkpoint', checkpoints['segmenter'], '--out', tmp_path / 'out'
    )
    assert code == 0, err
    labels = np.asarray(Image.open(tmp_path / 'out/labels/a.png'))
    _, sample = next(Predictor(checkpoints['segmenter'], device='cpu').predict(images / 'a.png'))
    assert np.array_equal(labels, sample.pred_sem_seg.data[0])
    assert json.loads((tmp_path / 'out/labels.json').read_text())['0'] == 'cat'


def test_images_of_one_name_and_of_folders_get_files_of_their_own(checkpoints, images, tmp_path, run_tool):
    (images / 'inner').mkdir()
    (images / '.thumbnails').mkdir()
    for name in ('a.jpg', 'inner/a.jpg', '.thumbnails/a.jpg'):
        (images / name).write_bytes((images / 'a.png').read_bytes())
    (images / 'broken.jpg').unlink()
    # The first one is given twice.
    given = (images / 'inner/../a.png', images, '--checkpoint', checkpoints['segmenter'], '--out', tmp_path / 'out')
    code, out, _ = run_tool('predict', *given, '--no-pictures')
    assert code == 0 and out.startswith('4 images predicted')
    written = {str(path.relative_to(tmp_path / 'out/labels')) for path in (tmp_path / 'out/labels').rglob('*.png')}
    assert written == {'a.png', 'a_2.png', 'inner/a.png', 'überholt 木.png'}
    assert not (tmp_path / 'out/pictures').exists()


def write_video(path, frames):
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'MJPG'), 10, (64, 48))
    for shade in range(frames):
        video.write(np.full((48, 64, 3), shade, np.uint8))
    video.release()


@pytest.mark.parametrize('kind', ['detector', 'segmenter'])
def test_a_video_becomes_a_video(kind, checkpoints, tmp_path, run_tool):
    write_video(tmp_path / 'video.avi', 3)
    options = ('--checkpoint', checkpoints[kind], '--out', tmp_path / 'out', '--score', 0, '--batch', 2)
    assert run_tool('predict', tmp_path / 'video.avi', *options)[0] == 0
    drawn = cv2.VideoCapture(str(tmp_path / 'out/pictures/video.mp4'))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    if kind == 'detector':
        frames = {result['frame'] for result in json.loads((tmp_path / 'out/predictions.json').read_text())}
        assert frames == {0, 1, 2}
    else:
        assert len([*(tmp_path / 'out/labels/video.avi').glob('00000?.png')]) == 3


def test_unreadable_files_are_named_with_the_reason_and_the_others_predicted(images, checkpoints, tmp_path, run_tool):
    whole = (images / 'überholt 木.jpg').read_bytes()
    (images / 'cut.jpg').write_bytes(whole[: len(whole) // 2])
    (images / 'empty.png').touch()
    (images / 'noise.mp4').write_bytes(bytes(range(256)) * 9)
    write_video(images / 'cut.avi', 40)
    video = (images / 'cut.avi').read_bytes()
    (images / 'cut.avi').write_bytes(video[: len(video) // 2])
    options = ('--checkpoint', checkpoints['segmenter'], '--out', tmp_path / 'out', '--no-pictures')
    code, out, _ = run_tool('predict', images, *options)
    assert code == 1
    reasons = dict(line.strip().rsplit(': ', 1) for line in out.splitlines()[2:])
    reasons = {name.rpartition('/')[2]: why for name, why in reasons.items()}
    assert reasons.pop('cut.jpg').startswith('cannot be read (')
    assert reasons.pop('cut.avi').startswith('ends after ')
    assert reasons == {'broken.jpg': 'is not an image', 'empty.png': 'is empty', 'noise.mp4': 'is no video'}
    assert {'a.png', 'überholt 木.png', 'cut.avi'} == {path.name for path in (tmp_path / 'out/labels').iterdir()}


def test_a_picture_that_jpeg_cannot_hold_is_told(checkpoints, tmp_path):
    from mmdet.structures import DetDataSample

    answers = Answers(tmp_path / 'out', Predictor(checkpoints['detector'], device='cpu'), tmp_path)
    pixels = np.zeros((2, 65501, 3), np.uint8)
    found = InstanceData(bboxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.int64))
    with pytest.raises(UserError, match='OpenCV cannot write .*a.jpg of 65501x2 pixels'):
        answers.add(Picture(tmp_path / 'a.png', pixels), DetDataSample(pred_instances=found))
    assert not [*tmp_path.rglob('*.jpg')]


def test_files_of_an_earlier_run_stay(images, checkpoints, tmp_path, run_tool):
    options = (images / 'a.png', '--checkpoint', checkpoints['segmenter'], '--out', tmp_path / 'out', '--no-pictures')
    assert run_tool('predict', *options)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').rglob('*')}
    code, _, error = run_tool('predict', *options)
    assert code == 2 and error.endswith(
        f'{tmp_path}/out holds labels.json and labels of an earlier run; give another folder, or delete them.\n'
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').rglob('*')} == before


def test_what_was_found_before_ctrl_c_is_written(checkpoints, images, tmp_path, monkeypatch, run_tool):
    predict = Predictor.predict

    def stop(self, inputs):
        yield next(predict(self, inputs))
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, 'predict', stop)
    options = ('--checkpoint', checkpoints['detector'], '--out', tmp_path / 'out', '--score', 0)
    code, out, _ = run_tool('predict', images, *options)
    assert (code, out) == (
        130,
        f'stopped: 1 images predicted, 20 objects of score 0 or more, results in {tmp_path}/out\n',
    )
    assert len(json.loads((tmp_path / 'out/predictions.json').read_text())) == 20


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (('--checkpoint', 'a.pth', '--model', 'a.onnx'), 'argument --model: not allowed with argument --checkpoint'),
        ((), 'one of the arguments --checkpoint --model is required'),
        (('--model', 'a.onnx'), 'The model a.onnx does not exist; give a file that `overlock export` wrote.'),
        (
            ('--model', 'a.onnx', '--config', 'upernet_overlock_s_160k'),
            'a.onnx carries all .*; leave the configuration',
        ),
        (('--model', 'a.xml'), 'a.xml is for other programs; export with --format onnx to predict here.'),
        (('--checkpoint', 'a.pth', '--tile', '8'), 'Tiles must have sides of at least 64 pixels, got 8.'),
        (('--checkpoint', 'a.pth', '--batch', '0'), 'The batch must be at least 1 image, got 0.'),
    ],
)
def test_a_mistake_is_one_sentence(options, said, images, tmp_path, monkeypatch, run_tool):
    monkeypatch.chdir(tmp_path)
    code, _, error = run_tool('predict', images, '--out', 'out', *options)
    assert code == 2 and re.search(said, error) and 'Traceback' not in error
    assert not (tmp_path / 'out').exists()


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


def test_what_a_run_was_logged_with_does_not_matter(checkpoints):
    content = torch.load(checkpoints['detector'], weights_only=True)
    content['meta']['cfg'] += (
        "\nvisualizer = dict(type='Visualizer', vis_backends=[dict(type='TensorboardVisBackend')])"
    )
    assert embedded_config(content, 'a.pth').default_scope == 'mmdet'


def test_a_checkpoint_without_a_configuration_says_so():
    with pytest.raises(UserError, match='a.pth carries no configuration; give the configuration'):
        embedded_config({'state_dict': {}}, 'a.pth')


def test_inputs_that_are_nothing_are_told(tmp_path):
    with pytest.raises(UserError, match='is no image, video'):
        Pictures([tmp_path])
    with pytest.raises(UserError, match='There is nothing to predict; give images'):
        Pictures([])


def test_a_folder_that_links_to_itself_has_each_image_once(images):
    (images / 'again').symlink_to(images)
    assert Pictures([images]).files == [images / name for name in ('a.png', 'broken.jpg', 'überholt 木.jpg')]


@pytest.mark.parametrize('name', ['detector', 'segmenter'])
def test_pictures_of_an_earlier_run_are_not_predicted(name, checkpoints, images, run_tool):
    options = ('--checkpoint', checkpoints[name], '--out', images / 'out')
    assert run_tool('predict', images / 'a.png', *options)[0] == 0
    file = 'predictions.json' if name == 'detector' else 'labels.json'
    with pytest.raises(UserError, match=f'images/out/{file} is of an earlier run, .* give a pattern, as .*images/'):
        Pictures([images])
    assert Pictures([images / '*.png']).files == [images / 'a.png']
    # Predictions without pictures.
    for folder in images.glob('out/*/'):
        shutil.rmtree(folder)
    assert len(Pictures([images]).files) == 3
