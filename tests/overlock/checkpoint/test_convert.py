"""Every way of converting weights keeps what the network computes, and tells what became of each tensor."""

import pytest
import torch

from overlock import OverLoCK, OverLoCKBackbone
from overlock.checkpoint import CheckpointError, convert, load, to_published
from overlock.checkpoint.convert import FATES, convert_file
from overlock.checkpoint.convert import convert as converted
from overlock.models.moganet import MogaNetBackbone
from overlock.models.names import form_of
from overlock.utils.errors import UserError
from tests.testing import (
    MODELS,
    MOGANET_TINY,
    TINY,
    TOLERANCES,
    assert_relative,
    assert_same,
    image,
    in_form,
    published_weights,
    randomise,
    same,
)

KINDS = ('cls', 'cls_reparam', 'det', 'seg')


@pytest.fixture(scope='module')
def published(shapes):
    """Published names and deterministic values of the classifier xt in float64."""
    return published_weights(shapes['cls']['xt'])


def detector(form='training', published=False):
    """The state dict of a detector with a tiny backbone."""
    backbone = in_form(randomise(OverLoCKBackbone(TINY)), form)
    backbone = to_published(backbone) if published else backbone
    return {
        **{f'backbone.{name}': value for name, value in backbone.items()},
        'neck.lateral_convs.0.conv.weight': torch.rand(4, 8, 1, 1),
        'roi_head.bbox_head.fc_cls.bias': torch.rand(5),
    }


def names(report, fate):
    """The names of all entries of a fate: the new ones if added, else those before."""
    return [entry.given or entry.written for entry in report.entries if entry.fate == fate]


def counts(report):
    return {fate: len(names(report, fate)) for fate in FATES}


def assert_balanced(report, before, after):
    """Every tensor before has one fate, and every tensor after one origin."""
    assert sorted(entry.given for entry in report.entries if entry.given) == sorted(before)
    assert sorted(entry.written for entry in report.entries if entry.written) == sorted(after)


@pytest.mark.parametrize(('kind', 'prefix'), [('cls', ''), ('cls_reparam', ''), ('det', 'backbone.'), ('seg', '')])
def test_names_go_both_ways_and_back(kind, prefix, shapes):
    given = {f'{prefix}{name}': torch.zeros(()).expand(shape) for name, shape in shapes[kind]['xt'].items()}
    ours, report = converted(given)
    assert counts(report) == {fate: len(given) * (fate == 'renamed') for fate in FATES}
    assert_balanced(report, given, ours)
    assert all(name.startswith(prefix) for name in ours) and not set(ours) & set(given)
    assert sorted(map(id, ours.values())) == sorted(map(id, given.values()))
    back, report = converted(ours, names='published')
    assert counts(report)['renamed'] == len(given)
    assert back.keys() == given.keys() and all(back[name] is value for name, value in given.items())
    for again, names in ((ours, 'ours'), (back, 'published')):
        unchanged, report = converted(again, names=names)
        assert same(unchanged, again) and counts(report)['kept'] == len(again)


@pytest.mark.parametrize('kind', KINDS)
def test_folded_form_is_that_of_deploy(kind, shapes):
    given = {name: torch.zeros(()).expand(shape) for name, shape in shapes[kind]['xt'].items()}
    tensors, report = converted(given, form='folded')
    assert_balanced(report, given, tensors)
    assert not names(report, 'dropped') and not names(report, 'kept')
    with torch.device('meta'):
        model = (
            OverLoCK('xt', deploy=True)
            if kind.startswith('cls')
            else OverLoCKBackbone('xt', deploy=True, overview_residual=kind == 'det')
        )
    expected = model.state_dict()
    assert list(tensors) == list(expected)
    assert all(value.shape == expected[name].shape for name, value in tensors.items())


def test_folded_form_computes_the_published_numbers(published, golden):
    tensors, _ = converted(published, form='folded')
    model = OverLoCK('xt', deploy=True).double().eval()
    model.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        assert_relative(model(image(1, 224, 224)), golden['cls/xt/224x224/logits'], TOLERANCES[torch.float64])
    again, report = converted(tensors, form='folded')
    assert same(again, tensors) and counts(report)['kept'] == len(tensors)


def test_merged_form_is_that_of_the_published_reparameterised_files(published, shapes):
    tensors, report = converted(published, names='published', form='merged')
    assert {name: list(value.shape) for name, value in tensors.items()} == shapes['cls_reparam']['xt']
    assert_balanced(report, published, tensors)
    assert all('lk_origin' in name or 'origin_bn' in name or 'dil_' in name for name in names(report, 'folded'))
    assert all(name.endswith(('lk_origin.weight', 'lk_origin.bias')) for name in names(report, 'added'))
    assert not names(report, 'renamed') and not names(report, 'dropped')
    again, report = converted(tensors, names='published', form='merged')
    assert same(again, tensors) and counts(report)['kept'] == len(tensors)


@pytest.mark.parametrize('form', ['merged', 'folded'])
@pytest.mark.parametrize('kind', ['classifier without aux head', 'detection', 'segmentation', 'outputs (0, 2)'])
def test_forms_compute_the_same(kind, form):
    model = randomise(MODELS[kind]().double()).eval()
    tensors, _ = converted(model.state_dict(), form=form)
    assert form_of(tensors) == form
    built = MODELS[kind](deploy=True).double().eval()
    built.load_state_dict(tensors, strict=True)
    assert_same(built, model, image(1, 64, 64), TOLERANCES[torch.float64])


def test_the_state_dict_given_is_not_changed():
    given = detector(published=True)
    kept = {name: value.clone() for name, value in given.items()}
    converted(given, form='folded', backbone=True)
    assert same(given, kept)


@pytest.mark.parametrize(('form', 'earlier'), [('folded', 'merged'), ('merged', 'training'), ('folded', 'training')])
def test_forms_do_not_go_back(form, earlier):
    message = f'^a.pth has the {form} form, out of which no {earlier} form can be made; give the file that it was'
    with pytest.raises(CheckpointError, match=message):
        converted(in_form(OverLoCKBackbone(TINY), form), form=earlier, source='a.pth')


def test_folded_form_has_no_published_names():
    with pytest.raises(CheckpointError, match='has the folded form .* no published names'):
        converted(OverLoCK(TINY).state_dict(), names='published', form='folded')


@pytest.mark.parametrize('published', [False, True], ids=['our names', 'published names'])
@pytest.mark.parametrize('form', [None, 'folded'])
def test_heads_of_a_detector_stay_as_they_are(form, published):
    given = detector(published=published)
    tensors, report = converted(given, form=form)
    assert_balanced(report, given, tensors)
    assert not names(report, 'dropped')
    for name in ('neck.lateral_convs.0.conv.weight', 'roi_head.bbox_head.fc_cls.bias'):
        assert tensors[name] is given[name] and name in names(report, 'kept')
    built = OverLoCKBackbone(TINY, deploy=form == 'folded')
    built.load_state_dict(
        {name.removeprefix('backbone.'): value for name, value in tensors.items() if name.startswith('backbone.')},
        strict=True,
    )


@pytest.mark.parametrize('form', [None, 'merged', 'folded'])
def test_backbone_of_a_detector_is_taken_out(form):
    given = detector(published=True)
    tensors, report = converted(given, form=form, backbone=True)
    assert names(report, 'dropped') == ['neck.lateral_convs.0.conv.weight', 'roi_head.bbox_head.fc_cls.bias']
    assert_balanced(report, given, tensors)
    model, other = (OverLoCKBackbone(TINY, deploy=True).eval() for _ in range(2))
    model.load_state_dict(tensors, strict=True)
    other.load_state_dict(
        {name.removeprefix('backbone.'): value for name, value in given.items() if name.startswith('backbone.')}
    )
    assert_same(model, other, image(1, 64, 64).float(), TOLERANCES[torch.float32])
    again, report = converted(tensors, form=form, backbone=True)
    assert same(again, tensors) and counts(report)['kept'] == len(tensors)


def test_a_classifier_has_no_backbone_to_take_out():
    with pytest.raises(CheckpointError, match='^a.pth is of a classifier, expected a detector .* load a classifier as'):
        converted(OverLoCK(TINY).state_dict(), backbone=True, source='a.pth')


def test_half_precision_is_folded_to_float32():
    half = randomise(OverLoCKBackbone(TINY)).half().state_dict()
    tensors, report = converted(half, form='folded')
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    expected, _ = converted(
        {name: value.double() if value.is_floating_point() else value for name, value in half.items()}, form='folded'
    )
    for name, value in tensors.items():
        assert_relative(value, expected[name], 1e-6)
    assert 'base_net.stage1.0.norm.weight' in names(report, 'kept')
    assert same(converted(half)[0], half)


def test_report_is_a_table_by_parts():
    given = detector(published=True)
    _, report = converted(given, form='folded', backbone=True)
    rows = {line.split()[0]: [int(number) for number in line.split()[1:]] for line in str(report).split('\n')[1:]}
    assert str(report).split('\n')[0].split() == ['part', *FATES]
    assert {
        'backbone.base_net',
        'backbone.overview_net',
        'backbone.focus_net',
        'backbone.output_norms',
        'neck',
        'roi_head',
        'all',
    } <= set(rows)
    assert rows['neck'] == [0, 0, 0, 1, 0] and rows['all'] == list(counts(report).values())
    assert [sum(column) for column in zip(*(row for part, row in rows.items() if part != 'all'), strict=True)] == rows[
        'all'
    ]
    details = report.details().split('\n')
    assert len(details) == len(report.entries)
    assert 'renamed  backbone.blocks1.0.proj.0.weight -> base_net.stage1.0.norm.weight' in details
    assert 'dropped  neck.lateral_convs.0.conv.weight -> -' in details
    assert 'added    - -> base_net.stem.0.conv.bias' in details


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_written_file_is_plain_whole_and_verified(suffix, tmp_path):
    state_dict = randomise(OverLoCKBackbone(TINY)).state_dict()
    # A view of something larger, in another memory format, behind what trainers write.
    large = torch.zeros(1000, *state_dict['overview_proj.weight'].shape)
    large[3] = state_dict['overview_proj.weight']
    state_dict['overview_proj.weight'] = large[3]
    state_dict['base_net.stem.1.conv.weight'] = state_dict['base_net.stem.1.conv.weight'].to(
        memory_format=torch.channels_last
    )
    torch.save(
        {'model': {f'module.{name}': value for name, value in state_dict.items()}, 'epoch': 3}, tmp_path / 'in.pth'
    )
    report = convert_file(tmp_path / 'in.pth', tmp_path / f'new/out{suffix}', form='folded')
    assert report.verified.startswith(
        f'{counts(report)["added"] + counts(report)["kept"]} tensors read back bit for '
        'bit, loaded strictly into OverLoCKBackbone (an arch of its own, folded form), '
    )
    assert [path.name for path in (tmp_path / 'new').iterdir()] == [f'out{suffix}']
    written = load(tmp_path / f'new/out{suffix}')
    expected, _ = converted(state_dict, form='folded')
    assert written.keys() == expected.keys()
    for name, value in written.items():
        assert type(value) is torch.Tensor and value.is_contiguous() and torch.equal(value, expected[name])
        assert value.untyped_storage().nbytes() == value.nbytes


@pytest.mark.parametrize('form', [None, 'folded'])
def test_converting_again_and_over_other_formats_gives_the_same_file(form, tmp_path):
    torch.save(to_published(randomise(OverLoCK(TINY)).state_dict()), tmp_path / '0.pth')
    for i, suffix in enumerate(('.pth', '.pth', '.safetensors', '.pth')):
        source = next(tmp_path.glob(f'{i}.*'))
        report = convert_file(source, tmp_path / f'{i + 1}{suffix}', form=form)
        if i:
            assert counts(report) == {fate: len(report.entries) * (fate == 'kept') for fate in FATES}
    assert (tmp_path / '1.pth').read_bytes() == (tmp_path / '2.pth').read_bytes() == (tmp_path / '4.pth').read_bytes()
    before = (tmp_path / '1.pth').read_bytes()
    convert_file(tmp_path / '0.pth', tmp_path / '1.pth', form=form)
    assert (tmp_path / '1.pth').read_bytes() == before


def test_narrow_floats_go_through(tmp_path):
    given = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in OverLoCKBackbone(TINY).state_dict().items()
    }
    torch.save(given, tmp_path / 'in.pth')
    for suffix in ('.pth', '.safetensors'):
        convert_file(tmp_path / 'in.pth', tmp_path / f'out{suffix}')
        written = load(tmp_path / f'out{suffix}')
        assert written.keys() == given.keys()
        assert all(value.dtype == given[name].dtype and value.equal(given[name]) for name, value in written.items())


def test_running_average_is_taken(tmp_path):
    trained, averaged = (randomise(OverLoCK(TINY)).state_dict() for _ in range(2))
    averaged = {name: value * 2 for name, value in averaged.items()}
    torch.save({'state_dict': trained, 'state_dict_ema': averaged, 'epoch': 3}, tmp_path / 'in.pth')
    for ema, expected in ((False, trained), (True, averaged)):
        convert_file(tmp_path / 'in.pth', tmp_path / 'out.pth', ema=ema)
        assert same(load(tmp_path / 'out.pth'), expected)
    with pytest.raises(CheckpointError, match='no running average'):
        convert_file(tmp_path / 'out.pth', tmp_path / 'again.pth', ema=True)
    assert not (tmp_path / 'again.pth').exists()


def test_file_of_a_detector_is_one_that_its_toolbox_loads(tmp_path):
    classes = {'classes': ('cat', 'dog'), 'palette': [(1, 2, 3), (4, 5, 6)]}
    torch.save(
        {
            'state_dict': detector(),
            'meta': {'dataset_meta': classes, 'cfg': 'model = 1', 'epoch': 3},
            'optimizer': {'state': {}},
        },
        tmp_path / 'in.pth',
    )
    convert_file(tmp_path / 'in.pth', tmp_path / 'out.pth', form='folded')
    content = torch.load(tmp_path / 'out.pth', weights_only=True)
    assert content.keys() == {'state_dict', 'meta'} and content['meta'] == {'dataset_meta': classes}
    # No safetensors file has such a part; one can be made into a whole file again, but for the classes.
    convert_file(tmp_path / 'out.pth', tmp_path / 'out.safetensors')
    convert_file(tmp_path / 'out.safetensors', tmp_path / 'again.pth')
    again = torch.load(tmp_path / 'again.pth', weights_only=True)
    assert again['meta'] == {} and again['state_dict'].keys() == content['state_dict'].keys()
    convert_file(tmp_path / 'in.pth', tmp_path / 'backbone.pth', backbone=True)
    assert 'base_net.stem.0.conv.weight' in torch.load(tmp_path / 'backbone.pth', weights_only=True)


def spoiled_write(path, tensors, meta, write=convert.write_weights):
    name = next(iter(tensors))
    write(path, {**tensors, name: tensors[name] + 1}, meta)


def cut_off_write(path, tensors, meta, write=convert.write_weights):
    write(path, tensors, meta)
    path.write_bytes(path.read_bytes()[:-1000])


def wrong_form(*args, convert=convert.convert):
    tensors, report = convert(*args)
    return {**tensors, 'base_net.stem.0.conv.weight': tensors['base_net.stem.0.conv.weight'] * 1.01}, report


@pytest.mark.parametrize('old', [b'an older file', None], ids=['over an older file', 'new'])
@pytest.mark.parametrize(
    ('name', 'broken', 'message'),
    [
        ('write_weights', spoiled_write, '^out.pth does not hold what was written to it, and was discarded'),
        ('write_weights', cut_off_write, 'is not a whole PyTorch checkpoint'),
        (
            'convert',
            wrong_form,
            r'^out.pth was discarded: .* deviate by \d\.\de-04 of the largest, expected at most 1e-0',
        ),
    ],
)
def test_a_file_that_fails_verification_leaves_all_as_it_was(name, broken, message, old, tmp_path, monkeypatch):
    torch.save(randomise(OverLoCKBackbone(TINY)).state_dict(), tmp_path / 'in.pth')
    if old:
        (tmp_path / 'out.pth').write_bytes(old)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(convert, name, broken)
    with pytest.raises(CheckpointError, match=message):
        convert_file(tmp_path / 'in.pth', tmp_path / 'out.pth', form='folded')
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize('name', ['backbone.overview_proj.bias', 'roi_head.bbox_head.fc_cls.bias'])
def test_weights_that_are_not_finite_are_refused(name, tmp_path):
    given = detector()
    given[name].view(-1)[0] = float('nan')
    torch.save(given, tmp_path / 'in.pth')
    with pytest.raises(CheckpointError, match=f'in.pth holds 1 tensor that cannot be weights .first {name}: 1 of'):
        convert_file(tmp_path / 'in.pth', tmp_path / 'out.pth')
    assert not (tmp_path / 'out.pth').exists()


@pytest.mark.parametrize(
    ('out', 'message'),
    [
        ('out.bin', r'must be a file that ends in .pth or .safetensors, got .*out.bin'),
        ('in.pth', 'is the file that is converted; give another name, so that nothing is lost'),
        ('link.pth', 'is the file that is converted'),
        ('folder.pth', 'must be a file that ends in'),
    ],
)
def test_the_file_given_and_other_kinds_of_files_are_never_written(out, message, tmp_path):
    torch.save(OverLoCK(TINY).state_dict(), tmp_path / 'in.pth')
    (tmp_path / 'link.pth').symlink_to('in.pth')
    (tmp_path / 'folder.pth').mkdir()
    before = (tmp_path / 'in.pth').read_bytes()
    with pytest.raises(UserError, match=message):
        convert_file(tmp_path / 'in.pth', tmp_path / out)
    assert (tmp_path / 'in.pth').read_bytes() == before


def test_report_names_the_variant(tmp_path):
    torch.save(OverLoCKBackbone('xt').state_dict(), tmp_path / 'xt.pth')
    assert '(xt, training form)' in convert_file(tmp_path / 'xt.pth', tmp_path / 'out.pth').verified


def test_folded_moganet_has_no_published_names(tmp_path):
    torch.save(MogaNetBackbone(MOGANET_TINY).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='has the folded form .* no published names; give'):
        convert_file(tmp_path / 'a.pth', tmp_path / 'out.pth', form='folded', names='published')
    assert not (tmp_path / 'out.pth').exists()
