"""An exported file holds for every size, says what it needs, and is there only if it agrees with PyTorch."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmengine_overlock.export as package
from mmengine_overlock.export import export
from mmengine_overlock.export.subjects import make_subject
from overlock import MogaNet, OverLoCK
from overlock.utils.errors import UserError
from tests.mmengine_overlock.export.conftest import CLASSES
from tests.testing import MOGANET_TINY, TINY

MISSING = [name for name in ('onnx', 'onnxruntime', 'onnxscript') if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f'the extra `export` is not installed: no {", ".join(MISSING)}')


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / 'tiny.pth'
    torch.manual_seed(0)
    torch.save(OverLoCK(TINY, num_classes=3).state_dict(), path)
    return path


def nodes_of(text):
    return int(text.rpartition('MiB, ')[2].removesuffix(' nodes'))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            ('--format', 'tensorrt', '--out', 'a.engine'),
            'on the GPU that they run on; export --format onnx, .* trtexec',
        ),
        (('--out', 'a.pth'), '--out takes a file name that ends in .onnx for onnx, got a.pth'),
        (('--out', 'a.onnx', '--size', '224'), "--size takes 'dynamic' or HEIGHTxWIDTH, as 800x1344, got 224"),
        (('--out', 'a.onnx', '--fp16', '--int8', '.'), '--fp16 and --int8 exclude each other'),
        (
            ('--out', 'a.pt2', '--format', 'exported-program', '--fp16'),
            '--fp16 is for ONNX and OpenVINO and --int8 for ONNX, got --format exp',
        ),
        (('--out', 'a.onnx', '--label-map'), '--part, --label-map and --cfg-options are for configurations'),
    ],
)
def test_a_mistake_is_one_sentence(options, message, run_tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(package.FORMATS, 'onnx', ('.onnx', ()))
    code, out, error = run_tool('export', 'overlock_xt', *options)
    assert (code, out, error.count('\n')) == (2, '', 1)
    assert re.search(message, error), error
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_what_works_instead(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'openvino' else True)
    with pytest.raises(UserError, match='--format openvino needs openvino; install with .*exported-program'):
        export('overlock_xt', format='openvino', out=tmp_path / 'a.xml')


@pytest.mark.parametrize('factor', [1.0, 1.01, float('nan')])
def test_a_file_takes_its_name_only_if_it_agrees(factor, tiny, tmp_path, monkeypatch):
    out = tmp_path / 'out.onnx'
    out.write_text('old')
    subjects = []
    monkeypatch.setitem(package.FORMATS, 'onnx', ('.onnx', ()))
    monkeypatch.setattr(package, 'trace', lambda subject, size: subjects.append(subject))
    monkeypatch.setattr(package, 'write_onnx', lambda program, subject, path: path.write_text('new'))
    monkeypatch.setattr(
        package, 'open_onnx', lambda path: lambda image: [y * factor for y in subjects[0].module(image)]
    )
    if factor == 1:
        text = export('overlock_xt', str(tiny), out=out)
        assert [line.split()[0] for line in text.split('\n')[2:4]] == ['33x63', '224x320']
    else:
        with pytest.raises(UserError, match='out.onnx was not written: at 33x63 onnxruntime gives something else'):
            export('overlock_xt', str(tiny), out=out)
    assert out.read_text() == ('new' if factor == 1 else 'old')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out.onnx', 'tiny.pth']


@pytest.mark.parametrize('preprocessing', [False, True])
def test_images_for_a_fixed_size_keep_their_ratio_and_are_padded_with_the_mean(preprocessing, small, picture):
    subject = make_subject(*map(str, small('upernet')), preprocessing=preprocessing)
    image = package._read(subject, picture, (128, 96))
    assert tuple(image.shape) == (1, 3, 128, 96)
    assert image.dtype == (torch.uint8 if preprocessing else torch.float32)
    # Of 151x203: the rest below is gray.
    assert (image[:, :, 73:] == (114 if preprocessing else 0)).all() and image[:, :, :70, -1].float().std() > 0.1


@pytest.mark.slow
@needs_onnx
def test_detector_file_holds_for_every_size_and_names_its_classes(small, picture, run_tool, tmp_path):
    import onnxruntime

    config, checkpoint = small('cascade')
    out = tmp_path / 'cascade.onnx'
    code, text, error = run_tool('export', config, checkpoint, '--out', out, '--images', picture)
    assert code == 0, error
    assert 'blots.png' in text and nodes_of(text.strip()) < 5000
    session = onnxruntime.InferenceSession(out)
    assert [out.name for out in session.get_outputs()] == ['boxes', 'scores', 'labels', 'masks']
    meta = {name: json.loads(value) if value[0] in '[{' else value for name, value in meta_of(session).items()}
    assert (meta['task'], meta['classes'], meta['pad_size_divisor']) == ('detector', list(CLASSES['classes']), '1')
    boxes, scores, labels, masks = session.run(None, {'image': torch.randn(4, 3, 97, 224).numpy()})
    assert (boxes.shape, scores.shape, labels.shape, masks.shape) == ((4, 100, 4), (4, 100), (4, 100), (4, 100, 28, 28))


def meta_of(session):
    return session.get_modelmeta().custom_metadata_map


@pytest.mark.slow
@needs_onnx
def test_segmenter_file_takes_pixels_and_gives_labels(small, picture, tmp_path):
    import onnxruntime

    config, checkpoint = small('upernet')
    out = tmp_path / 'upernet.onnx'
    export(config, str(checkpoint), out=out, size='96x128', images=picture, preprocessing=True, label_map=True)
    session = onnxruntime.InferenceSession(out)
    assert session.get_inputs()[0].type == 'tensor(uint8)'
    (labels,) = session.run(None, {'image': torch.zeros(1, 3, 96, 128, dtype=torch.uint8).numpy()})
    assert labels.shape == (1, 96, 128) and meta_of(session)['input'].startswith('RGB pixels')


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize(('narrow', 'kind'), [('fp16', 'mask_rcnn'), ('fp16', 'upernet'), ('int8', 'retinanet')])
def test_narrow_files_are_smaller_and_their_loss_is_told(narrow, kind, small, picture, tmp_path):
    import onnx

    config, checkpoint = small(kind)
    out = tmp_path / 'narrow.onnx'
    options = dict(fp16=True, images=picture) if narrow == 'fp16' else dict(int8=picture.parent)
    text = export(config, str(checkpoint), out=out, size='160x192', **options)
    graph = onnx.load(out).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    sources = {node.output[0]: node.input[0] for node in graph.node if node.op_type in ('Cast', 'DequantizeLinear')}
    weights = [node.input[1] for node in graph.node if node.op_type == 'Conv']
    kinds = {types.get(sources.get(weight, weight)) for weight in weights}
    assert kinds == {onnx.TensorProto.FLOAT16 if narrow == 'fp16' else onnx.TensorProto.INT8}
    row = next(line for line in text.split('\n') if 'blots.png' in line)
    assert ' of ' in row


@pytest.mark.slow
def test_exported_program_runs_with_torch_alone(tiny, tmp_path):
    out = tmp_path / 'tiny.pt2'
    export('overlock_xt', str(tiny), out=out, format='exported-program')
    code = (
        'import sys, torch; program = torch.export.load(sys.argv[1]); '
        'print(tuple(program.module()(torch.rand(2, 3, 70, 99))[0].shape), "overlock" in sys.modules)'
    )
    done = subprocess.run([sys.executable, '-c', code, out], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == '(2, 3) False', done.stderr


@pytest.mark.slow
@needs_onnx
@pytest.mark.parametrize('format', ['onnx', 'openvino'])
def test_moganet_is_exported_too(format, tmp_path):
    if format == 'openvino' and importlib.util.find_spec('openvino') is None:
        pytest.skip('openvino is not installed')
    torch.save(MogaNet(MOGANET_TINY, num_classes=3).state_dict(), tmp_path / 'tiny.pth')
    out = tmp_path / ('tiny.onnx' if format == 'onnx' else 'a, b.xml')
    text = export('moganet_xt', str(tmp_path / 'tiny.pth'), out=out, format=format)
    assert '224x320 x3' in text
    written = ['tiny.onnx', 'tiny.pth'] if format == 'onnx' else ['a, b.bin', 'a, b.xml', 'tiny.pth']
    assert sorted(path.name for path in tmp_path.iterdir()) == written


@pytest.mark.slow
@needs_onnx
def test_classifier_of_the_smallest_variant_has_few_nodes(tmp_path):
    text = export('overlock_xt', out=tmp_path / 'xt.onnx')
    assert 'random weights: no checkpoint was given' in text
    assert nodes_of(text) < 2000
    assert Path(tmp_path / 'xt.onnx').stat().st_size < 70e6
