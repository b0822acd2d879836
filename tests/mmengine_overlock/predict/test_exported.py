"""Exported files predict as the checkpoint that they come from, by the same interface."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmengine_overlock.export import export
from mmengine_overlock.export.checks import compare_detections
from mmengine_overlock.predict import Predictor
from overlock.utils.errors import UserError
from tests.mmengine_overlock.predict.conftest import blots

MISSING = [name for name in ('onnx', 'onnxruntime', 'onnxscript') if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f'the extra `export` is not installed: no {", ".join(MISSING)}')

INFO = dict(
    classes=['red', '緑', 'blue'],
    mean=[100.0, 100, 100],
    std=[50.0, 50, 50],
    pad_size_divisor=1,
    smallest_side=33,
    pipeline=[dict(type='Resize', scale=[64, 48], keep_ratio=True)],
    mask_threshold=0.5,
)


def write_onnx(path, info, outputs, size=('height', 'width'), pixels=False):
    """Write a file whose outputs are constants, or 'image': the image itself."""
    from onnx import TensorProto, helper, numpy_helper, save

    batch = 1 if isinstance(size[0], int) else 'batch'
    kind = TensorProto.UINT8 if pixels else TensorProto.FLOAT
    nodes, values = [], []
    for name, value in outputs.items():
        if isinstance(value, str):
            nodes.append(helper.make_node('Cast', ['image'], [name], to=TensorProto.FLOAT))
            values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        else:
            tensor = numpy_helper.from_array(value)
            nodes.append(helper.make_node('Constant', [], [name], value=tensor))
            values.append(helper.make_tensor_value_info(name, tensor.data_type, value.shape))
    image = helper.make_tensor_value_info('image', kind, [batch, 3, *size])
    model = helper.make_model(
        helper.make_graph(nodes, 'graph', [image], values), opset_imports=[helper.make_opsetid('', 18)], ir_version=10
    )
    helper.set_model_props(model, {k: v if isinstance(v, str) else json.dumps(v) for k, v in info.items()})
    save(model, path)
    return path


@pytest.mark.parametrize('pixels', [False, True])
@pytest.mark.parametrize('size', [('height', 'width'), (48, 64), (96, 64)])
@pytest.mark.parametrize('tile', [None, 64])
def test_a_segmenter_gives_labels_at_the_size_of_the_image(pixels, size, tile, tmp_path):
    # Of each pixel the largest of red, green and blue.
    path = write_onnx(
        tmp_path / 'a.onnx', dict(INFO, task='segmenter', outputs=['logits']), {'logits': 'image'}, size, pixels
    )
    image = np.zeros((90, 130, 3), np.uint8)
    image[:, :70, 0], image[:, 70:, 1], image[60:, 70:, 2] = 250, 250, 255
    if tile:
        # Stripes of a pixel: windows see the image in its own resolution.
        image[::2, :20] = 0, 255, 0
    if tile and isinstance(size[0], int) and min(size) < tile:
        with pytest.raises(UserError, match='tiles can have at most 48 pixels a side, got 64'):
            Predictor(path, device='cpu', tile=tile)
        return
    predictor = Predictor(path, device='cpu', batch=2, tile=tile)
    assert (predictor.scope, predictor.classes) == ('mmseg', ('red', '緑', 'blue'))
    for sample in predictor([image, image]):
        labels = sample.pred_sem_seg.data[0].numpy()
        assert labels.shape == (90, 130)
        # Blue comes first in the image; borders are smooth.
        assert (labels == image[..., ::-1].argmax(-1)).mean() > (0.9999 if tile else 0.97)


@pytest.mark.parametrize('size', [('height', 'width'), (60, 80)])
def test_a_detector_gives_boxes_and_masks_in_pixels_of_the_image(size, tmp_path):
    # For an image of 96x128 at 48x64, or at 60x80: a box, one that leaves it, one in the padding, and none.
    scale = 2.0 if size == ('height', 'width') else 1.6
    boxes = np.array([[[10, 20, 30, 40], [40, 30, 300, 300], [90, 0, 99, 9], [0, 0, 0, 0]]], np.float32)
    masks = np.zeros((1, 4, 28, 28), np.float32)
    masks[0, 0, :, 14:], masks[0, 1] = 1, 1
    outputs = dict(
        boxes=boxes, scores=np.array([[0.9, 0.8, 0.7, -1]], np.float32), labels=np.array([[2, 1, 0, 0]]), masks=masks
    )
    path = write_onnx(tmp_path / 'a.onnx', dict(INFO, task='detector'), outputs, size)
    found = Predictor(path, device='cpu', score=0.5)([blots(96, 128)])[0].pred_instances
    assert (found.scores.tolist(), found.labels.tolist()) == (pytest.approx([0.9, 0.8]), [2, 1])
    expected = [[10 * scale, 20 * scale, 30 * scale, 40 * scale], [40 * scale, 30 * scale, 128, 96]]
    torch.testing.assert_close(found.bboxes, torch.tensor(expected))
    assert found.masks.shape == (2, 96, 128) and found.masks.dtype == torch.bool
    x1, y1, x2, y2 = (round(side) for side in expected[0])
    assert (
        not found.masks[0, y1:y2, : (x1 + x2) // 2 - 1].any() and found.masks[0, y1:y2, (x1 + x2) // 2 + 1 : x2].all()
    )


@pytest.mark.parametrize(
    ('info', 'said'),
    [
        ({}, 'must be a detector or segmenter written by `overlock export`, but its metadata says nothing'),
        (dict(INFO, task='backbone'), 'but its metadata says it is a backbone'),
        (
            {k: v for k, v in INFO.items() if k != 'pipeline'} | dict(task='segmenter'),
            'lack its test pipeline, got None;',
        ),
        (
            dict(INFO, task='segmenter', pipeline=[dict(type='os.system')]),
            "pipeline, got .*'os.system'.*export it again",
        ),
        (
            dict(INFO, pipeline=[dict(type='RandomChoice', transforms=[[dict(type='os.system')]])], task='segmenter'),
            "pipeline, got .*'os.system'.*export it again",
        ),
        (dict(INFO, task='segmenter', pipeline=[dict(type='Resize', _scope_='antigravity')]), "got .*'_scope_'"),
        (dict(INFO, task='segmenter', pipeline='Resize'), 'lack its test pipeline'),
        (
            {'task': 'segmenter', **dict.fromkeys(['mean', 'std'], [1])},
            'lack pad_size_divisor, smallest_side, classes;',
        ),
    ],
)
def test_a_file_without_our_metadata_is_one_sentence(info, said, images, tmp_path, run_tool):
    path = write_onnx(tmp_path / 'a.onnx', info, {'logits': 'image'})
    code, _, error = run_tool('predict', images, '--model', path, '--out', tmp_path / 'out')
    assert code == 2 and error.count('\n') == 1
    with pytest.raises(UserError, match=said):
        Predictor(path)


@pytest.mark.parametrize(('device', 'present'), [('xpu:0', ['CUDA', 'CPU']), ('cuda', ['CPU'])])
def test_a_device_that_onnxruntime_lacks_is_one_sentence(device, present, tmp_path, monkeypatch):
    present = [f'{name}ExecutionProvider' for name in present]
    monkeypatch.setattr('onnxruntime.get_available_providers', lambda: present)
    path = write_onnx(tmp_path / 'a.onnx', dict(INFO, task='segmenter'), {'logits': 'image'})
    with pytest.raises(UserError, match=f'onnxruntime has no device {device} here, only {", ".join(present)}'):
        Predictor(path, device=device)


@pytest.mark.parametrize('device', ['cuda:1', None])
def test_a_gpu_that_was_asked_for_is_not_replaced_by_the_cpu(device, tmp_path, monkeypatch):
    import onnxruntime

    given, open_session = [], onnxruntime.InferenceSession

    def open_on_cpu(path, options, providers):
        given.extend(providers)
        # As onnxruntime does where CUDA's libraries are missing.
        return open_session(path, options, providers=['CPUExecutionProvider'])

    monkeypatch.setattr(onnxruntime, 'get_available_providers', lambda: ['CUDAExecutionProvider'])
    monkeypatch.setattr(onnxruntime, 'InferenceSession', open_on_cpu)
    path = write_onnx(tmp_path / 'a.onnx', dict(INFO, task='segmenter'), {'logits': 'image'})
    if device is None:
        Predictor(path)
    else:
        with pytest.raises(UserError, match='onnxruntime cannot use the device cuda:1: it lacks libraries'):
            Predictor(path, device=device)
    assert given[0] == ('CUDAExecutionProvider', {'device_id': '1' if device else '0'})


def test_a_file_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / 'a.onnx').write_bytes(b'no graph')
    with pytest.raises(UserError, match='onnxruntime cannot open .*a.onnx .*; export it again'):
        Predictor(tmp_path / 'a.onnx', device='cpu')


def test_a_segmenter_of_onnx_writes_what_a_checkpoint_does(images, tmp_path, run_tool):
    path = write_onnx(tmp_path / 'a.onnx', dict(INFO, task='segmenter'), {'logits': 'image'})
    code, out, _ = run_tool('predict', images / 'a.png', '--model', path, '--out', tmp_path / 'out')
    assert code == 0 and 'no font of this machine has the letters of 緑' in out
    assert np.asarray(Image.open(tmp_path / 'out/labels/a.png')).shape == (96, 128)
    assert json.loads((tmp_path / 'out/labels.json').read_text())['1'] == '緑'
    assert Image.open(tmp_path / 'out/pictures/a.jpg').size[0] == 128


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'preprocessing'), [('detector', False), ('segmenter', True)])
def test_an_exported_file_predicts_as_its_checkpoint(kind, preprocessing, checkpoints, tmp_path):
    checkpoint = checkpoints[kind]
    config = checkpoint.with_suffix('.py')
    export(config, str(checkpoint), out=tmp_path / 'a.onnx', preprocessing=preprocessing)
    image = blots(203, 151)
    found, truth = (Predictor(file, device='cpu')([image])[0] for file in (tmp_path / 'a.onnx', checkpoint))
    if kind == 'segmenter':
        assert (found.pred_sem_seg.data == truth.pred_sem_seg.data).double().mean() > 0.999
        return
    parts = [[part.pred_instances.get(name) for name in ('bboxes', 'scores', 'labels')] for part in (found, truth)]
    difference, same, count = compare_detections(*parts)
    assert same >= 0.9 * count and count == 20 and difference < 0.1
    assert found.pred_instances.masks.shape == truth.pred_instances.masks.shape
