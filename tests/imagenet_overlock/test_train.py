"""Training: exact resuming, checkpoints, losses, and the sentences for what cannot go on."""

import csv
import math

import pytest
import torch
from timm.data.transforms import RandomResizedCropAndInterpolation

import overlock.checkpoint
from imagenet_overlock import Recipe
from imagenet_overlock.checkpoints import read_checkpoint, starting_weights
from imagenet_overlock.data import seed_epoch, train_loader
from imagenet_overlock.distributed import World
from imagenet_overlock.folder import check_folder
from imagenet_overlock.train import Trainer, train
from imagenet_overlock.validate import validate
from overlock.checkpoint import CheckpointError
from overlock.models.names import to_published
from overlock.utils.errors import UserError
from tests.imagenet_overlock import tiny


class Killed(Exception):
    pass


@pytest.fixture
def kill_in_epoch(monkeypatch):
    """Makes training stop in the middle of an epoch, counted from 0, until it is undone."""

    def kill(epoch):
        def update(self, batches):
            if self.epoch == epoch and self.done % self.updates == 1:
                raise Killed
            return original(self, batches)

        original = Trainer._update
        monkeypatch.setattr(Trainer, '_update', update)
        return lambda: monkeypatch.setattr(Trainer, '_update', original)

    return kill


def assert_same_state(actual, expected):
    for name in ('epoch', 'metric', 'args', 'classes'):
        assert actual[name] == expected[name]
    for name in ('state_dict', 'state_dict_ema', 'optimizer'):
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)
    for a, b in zip(actual['history'], expected['history'], strict=True):
        timeless = [{name: value for name, value in row.items() if 'second' not in name} for row in (a, b)]
        assert timeless[0] == timeless[1]


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 1])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(drawn, recipe, tmp_path, kill_in_epoch, workers):
    settings = recipe(workers=workers, grad_accum_steps=1 + workers, batch_size=10 - 6 * workers)
    train(settings, drawn, tmp_path / 'whole')
    revive = kill_in_epoch(1)
    with pytest.raises(Killed):
        train(settings, drawn, tmp_path / 'killed')
    revive()
    assert read_checkpoint(tmp_path / 'killed' / 'last.pth')['epoch'] == 0
    # What another process would have drawn meanwhile.
    torch.rand(7)
    train(settings, drawn, tmp_path / 'killed', resume='auto')
    whole, resumed = (read_checkpoint(tmp_path / name / 'last.pth') for name in ('whole', 'killed'))
    assert whole['epoch'] == 2
    assert_same_state(resumed, whole)


@pytest.mark.parametrize(
    'saved, told', [(False, 'there is no checkpoint yet.'), (True, 'last.pth holds the state of epoch 0; to go on, ')]
)
def test_an_interrupted_run_tells_what_it_leaves(drawn, recipe, tmp_path, monkeypatch, saved, told):
    def interrupt(self, writer):
        if saved:
            (tmp_path / 'last.pth').touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, 'fit', interrupt)
    with pytest.raises(KeyboardInterrupt, match=told):
        train(recipe(), drawn, tmp_path)


def test_epochs_seeds_and_processes_draw_different_images(drawn, recipe):
    split, model = check_folder(drawn)[0], tiny.TimmOverLoCK(tiny.ARCH, num_classes=10)
    draws = []
    for seed, epoch, rank in ((1, 0, 0), (1, 1, 0), (2, 0, 0), (1, 0, 1), (1, 0, 0)):
        seed_epoch(seed, epoch, rank)
        loader = train_loader(recipe(seed=seed), split, World(torch.device('cpu')), model)
        draws.append(next(iter(loader))[0])
    assert torch.equal(draws[0], draws[-1])
    assert not any(torch.equal(a, b) for i, a in enumerate(draws[:-1]) for b in draws[:i])


def test_checkpoints_are_loaded_by_the_project_and_hold_both_kinds_of_weights(drawn, recipe, tmp_path):
    train(recipe(epochs=2), drawn, tmp_path)
    last, average = (overlock.checkpoint.load(tmp_path / 'last.pth', ema=ema) for ema in (False, True))
    assert last.keys() == average.keys()
    name = 'base_net.stem.0.conv.weight'
    assert not torch.equal(last[name], average[name])
    model = tiny.TimmOverLoCK(tiny.ARCH, num_classes=10, aux_head=True)
    overlock.checkpoint.load_state_dict(model, average)
    torch.testing.assert_close(model.state_dict()[name], average[name])


def test_the_average_is_that_of_the_weights_after_each_update(drawn, recipe, tmp_path, monkeypatch):
    seen = []
    original = Trainer._update

    def update(self, batches):
        if not seen:
            seen.append(self.model.head.fc.weight.detach().clone())
        losses = original(self, batches)
        seen.append(self.model.head.fc.weight.detach().clone())
        return losses

    monkeypatch.setattr(Trainer, '_update', update)
    train(recipe(epochs=2, model_ema_decay=0.8), drawn, tmp_path)
    average = seen[0]
    for weight in seen[1:]:
        average = 0.8 * average + 0.2 * weight
    torch.testing.assert_close(read_checkpoint(tmp_path / 'last.pth')['state_dict_ema']['head.fc.weight'], average)


def test_the_loss_is_that_of_the_main_head_plus_a_part_of_the_auxiliary_one(drawn, recipe, tmp_path):
    row = train(recipe(epochs=1, warmup_epochs=0, aux_weight=0.3), drawn, tmp_path)[0]
    assert row['train_loss'] == pytest.approx(row['train_loss_main'] + 0.3 * row['train_loss_aux'], rel=1e-6)
    # Softmax over ten classes that nothing is known of, both heads.
    assert row['train_loss_main'] == pytest.approx(math.log(10), rel=0.2)
    assert {'val_top1', 'val_top5', 'val_aux_top1', 'val_aux_top5', 'val_ema_top1', 'val_ema_aux_top1'} <= row.keys()


def test_the_weight_of_the_auxiliary_head_scales_its_gradients_alone(drawn, recipe, tmp_path, monkeypatch):
    gradients = []

    def fit(self, writer=None):
        batch = [(torch.ones(2, 3, 32, 32), torch.tensor([1, 2])), (torch.zeros(2, 3, 32, 32), torch.tensor([3, 3]))]
        self.parallel.train()
        monkeypatch.setattr(self.optimizer, 'zero_grad', lambda: None)
        self._update(iter(batch))
        gradients.append({name: parameter.grad for name, parameter in self.model.named_parameters()})

    monkeypatch.setattr(Trainer, 'fit', fit)
    for weight in (0.3, 0.6):
        train(
            recipe(aux_weight=weight, mixup=0, cutmix=0, drop_path=0, clip_grad=0, grad_accum_steps=2), drawn, tmp_path
        )
    small, large = gradients
    torch.testing.assert_close(large['head.fc.weight'], small['head.fc.weight'])
    torch.testing.assert_close(large['aux_head.fc.weight'], 2 * small['aux_head.fc.weight'])
    # Smoothed targets less what softmax gives: the mean over the images of both steps sums to zero over classes.
    bias = small['head.fc.bias']
    assert bias.argsort()[:1].tolist() == [3] and bias.sum().abs() < 1e-6
    assert bias.abs().sum() > 0.5


def test_a_run_without_auxiliary_head_average_and_mixing_works(drawn, recipe, tmp_path):
    rows = train(
        recipe(aux_weight=0, model_ema=False, mixup=0, cutmix=0, batch_size=7, aa='', epochs=2), drawn, tmp_path
    )
    assert not [name for name in rows[0] if 'aux' in name or 'ema' in name]
    content = read_checkpoint(tmp_path / 'last.pth')
    assert 'state_dict_ema' not in content
    assert not [name for name in content['state_dict'] if name.startswith('aux_head.')]


@pytest.fixture
def trainer(drawn, recipe, tmp_path, monkeypatch):
    """Make a trainer that has not begun."""

    def make(**settings):
        trainers = []
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, 'fit', lambda self, writer=None: trainers.append(self))
            train(recipe(**settings), drawn, tmp_path / 'run')
        return trainers[0]

    return make


def test_the_published_learning_rate_follows_the_formula_in_every_epoch(trainer):
    settings = {name: getattr(Recipe(), name) for name in ('epochs', 'cooldown_epochs', 'warmup_epochs')}
    run = trainer(**settings, lr=2e-3)
    rates = []
    for epoch in range(run.epochs):
        run.epoch, run.done = epoch, epoch * run.updates
        run._schedule()
        for update in range(run.updates):
            run.scheduler.step_update(run.done + update)
            rates.append(run._lr)
    assert len(rates) == 310 * 2
    for epoch, (first, second) in enumerate(zip(rates[::2], rates[1::2], strict=True)):
        cosine = 1e-5 + (2e-3 - 1e-5) * (1 + math.cos(math.pi * min(epoch, 300) / 300)) / 2
        warmup = 1e-6 + (2e-3 - 1e-6) * epoch / 5
        assert first == second == pytest.approx(warmup if epoch < 5 else cosine, rel=1e-9)


def test_the_learning_rate_can_follow_the_updates(drawn, recipe, tmp_path, monkeypatch):
    rates = []
    original = Trainer._update

    def update(self, batches):
        rates.append(self._lr)
        return original(self, batches)

    monkeypatch.setattr(Trainer, '_update', update)
    train(recipe(sched_on_updates=True, warmup_lr=1e-6, min_lr=1e-5, cooldown_epochs=1), drawn, tmp_path)
    assert len(rates) == 8
    expected = [1e-6 + (1e-3 - 1e-6) * i / 2 for i in range(2)]
    expected += [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * min(i, 6) / 6)) / 2 for i in range(2, 8)]
    assert rates == pytest.approx(expected)


def _decays(trainer):
    """Return the weight decay of each parameter."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.optimizer.param_groups
    return {names[parameter]: group['weight_decay'] for group in groups for parameter in group['params']}


def test_weights_decay_as_the_published_names_say_by_the_rule_of_timm(trainer):
    run = trainer(weight_decay=0.05)
    decays = _decays(run)
    published = to_published({name: torch.full_like(p, decays[name]) for name, p in run.model.named_parameters()})
    assert decays.keys() == dict(run.model.named_parameters()).keys()
    for name, marked in published.items():
        expected = 0.0 if marked.ndim <= 1 or name.endswith('.bias') else 0.05
        assert marked.unique().tolist() == pytest.approx([expected]), name
    decayed = [name for name, marked in published.items() if marked.any()]
    for part in ('.rpb1', '.gamma', '.beta', '.ls1.weight'):
        assert any(part in name for name in decayed), part


def test_layer_decay_scales_rates_and_leaves_weight_decay(trainer):
    run = trainer(weight_decay=0.05, layer_decay=0.7)
    assert _decays(run) == _decays(trainer(weight_decay=0.05))
    scales = [group['lr_scale'] for group in run.optimizer.param_groups]
    assert max(scales) == 1 and min(scales) < 0.7**3


@pytest.mark.parametrize(('name', 'kinds'), [('random', {'bilinear', 'bicubic'}), ('bilinear', {'bilinear'})])
def test_training_images_are_resized_as_the_recipe_says(trainer, name, kinds):
    run = trainer(train_interpolation=name)
    (crop,) = (t for t in run.loader.dataset.transform.transforms if isinstance(t, RandomResizedCropAndInterpolation))
    found = crop.interpolation if isinstance(crop.interpolation, tuple) else (crop.interpolation,)
    assert {mode.value for mode in found} == kinds


def test_gradient_checkpointing_changes_no_figures(drawn, recipe, tmp_path):
    losses = [
        train(recipe(epochs=1, warmup_epochs=0, **settings), drawn, tmp_path / str(i))[0]
        for i, settings in enumerate(
            ({}, dict(grad_checkpointing=True), dict(grad_checkpointing=True, ckpt_stg=(1, 0, 1, 0)))
        )
    ]
    for row in losses[1:]:
        assert row['train_loss'] == pytest.approx(losses[0]['train_loss'], rel=1e-6)


def test_gradient_checkpointing_takes_a_number_of_blocks_for_each_stride(trainer):
    run = trainer(grad_checkpointing=True, ckpt_stg=(0, 0, 1, 0))
    checkpointed = [name for name, module in run.model.named_modules() if getattr(module, 'with_cp', False)]
    assert checkpointed == ['base_net.stage3.0', 'focus_net.stage3.0']


def test_best_is_the_epoch_with_the_highest_accuracy_and_summary_has_every_epoch(drawn, recipe, tmp_path, monkeypatch):
    accuracies = iter([10.0, 30.0, 20.0])
    monkeypatch.setattr(
        Trainer,
        '_validate',
        lambda self: {'val_loss': 1.0, 'val_top1': 0.0, 'val_top5': 0.0, 'val_ema_top1': next(accuracies)},
    )
    train(recipe(), drawn, tmp_path)
    best = read_checkpoint(tmp_path / 'best.pth')
    assert (best['epoch'], best['metric'], 'optimizer' in best) == (1, 30.0, False)
    with (tmp_path / 'summary.csv').open() as file:
        assert [(row['epoch'], row['val_ema_top1']) for row in csv.DictReader(file)] == [
            ('0', '10.0'),
            ('1', '30.0'),
            ('2', '20.0'),
        ]
    with pytest.raises(CheckpointError, match='is without the state of the optimizer and cannot be resumed'):
        train(recipe(), drawn, tmp_path, resume=str(tmp_path / 'best.pth'))


def test_fine_tuning_takes_over_weights_and_classifiers_that_fit(drawn, recipe, tmp_path, monkeypatch):
    train(recipe(epochs=1, warmup_epochs=0), drawn, tmp_path / 'first')
    path = tmp_path / 'first' / 'last.pth'
    trainers = []
    monkeypatch.setattr(Trainer, 'fit', lambda self, writer=None: trainers.append(self))
    train(recipe(initial_checkpoint=str(path), img_size=64), drawn, tmp_path / 'second')
    torch.testing.assert_close(
        dict(trainers[0].model.state_dict()), overlock.checkpoint.load(path, ema=True), rtol=0, atol=0
    )


def test_fine_tuning_starts_the_heads_anew_for_other_classes(drawn, recipe, tmp_path, monkeypatch, caplog):
    given = tiny.TimmOverLoCK(tiny.ARCH, num_classes=1000).state_dict()
    torch.save(given, tmp_path / 'in1k.pth')
    trainers = []
    monkeypatch.setattr(Trainer, 'fit', lambda self, writer=None: trainers.append(self))
    with caplog.at_level('INFO', 'imagenet_overlock'):
        train(recipe(initial_checkpoint=str(tmp_path / 'in1k.pth')), drawn, tmp_path / 'run')
    state = trainers[0].model.state_dict()
    assert state['head.fc.weight'].shape[0] == state['aux_head.fc.weight'].shape[0] == 10
    torch.testing.assert_close(state['head.proj.conv.weight'], given['head.proj.conv.weight'], rtol=0, atol=0)
    assert 'aux_head.bn, aux_head.fc, head.fc start anew' in caplog.text


def test_tensorboard_has_the_figures_of_every_epoch(drawn, recipe, tmp_path):
    event_accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    rows = train(recipe(epochs=2), drawn, tmp_path, tensorboard=True)
    events = event_accumulator.EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    for tag, name in (('train/loss', 'train_loss'), ('val/top1', 'val_top1'), ('lr', 'lr')):
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [
            (row['epoch'] + 1, pytest.approx(row[name])) for row in rows
        ]


@pytest.fixture
def faulty(monkeypatch):
    """Make the loss of some updates, counted from 0, not finite, and keep the weights before and after every update."""
    original, weights = Trainer._update, []

    def make(*faults):
        def update(self, batches):
            weights.append({name: value.clone() for name, value in self.model.state_dict().items()})
            loss = self.loss
            if self.done in faults:
                self.loss = lambda *args: loss(*args) * math.nan
            try:
                return original(self, batches)
            finally:
                self.loss = loss
                weights.append({name: value.clone() for name, value in self.model.state_dict().items()})

        monkeypatch.setattr(Trainer, '_update', update)
        return weights

    return make


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(drawn, recipe, tmp_path, faulty):
    weights = faulty(3)
    with pytest.raises(
        UserError,
        match='The loss or a gradient of update 2 is not finite .loss nan, main nan, auxiliary nan. in epoch 2; '
        '.*last.pth holds the state of epoch 1. Lower',
    ):
        train(recipe(), drawn, tmp_path)
    assert read_checkpoint(tmp_path / 'last.pth')['epoch'] == 0
    for name, weight in weights[-1].items():
        assert torch.equal(weight, weights[-2][name]) or 'running' in name or 'num_batches' in name


@pytest.mark.parametrize('amp', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_skip_leaves_out_updates_and_averages_the_others(drawn, recipe, tmp_path, faulty, caplog, amp):
    weights = faulty(3)
    settings = dict(amp=amp, model='overlock_wide', amp_dtype='float16') if amp else {}
    rows = train(recipe(on_nan='skip', log_interval=1, **settings), drawn, tmp_path)
    assert all(math.isfinite(row['train_loss']) for row in rows)
    torch.testing.assert_close(weights[7], weights[6], rtol=0, atol=0)
    assert amp or not torch.equal(weights[9]['head.fc.weight'], weights[8]['head.fc.weight'])
    # A loss scale leaves out some at its start.
    assert (caplog.text.count('loss nan, main nan, auxiliary nan): it was left out')) == 1


def test_weights_that_are_not_finite_are_not_saved(drawn, recipe, tmp_path, monkeypatch):
    original = Trainer._validate

    def validate_and_spoil(self):
        row = original(self)
        if self.epoch == 1:
            self.ema.module.head.fc.bias.data[0] = math.inf
        return row

    monkeypatch.setattr(Trainer, '_validate', validate_and_spoil)
    with pytest.raises(UserError, match='1 tensors of the average .first head.fc.bias. are not finite in epoch 2'):
        train(recipe(), drawn, tmp_path)
    assert read_checkpoint(tmp_path / 'last.pth')['epoch'] == 0
    assert read_checkpoint(tmp_path / 'best.pth')['epoch'] == 0


@pytest.mark.parametrize(
    ('settings', 'sentence'),
    [
        (dict(model='overlock_xxl'), 'There is no model overlock_xxl; the models are moganet_b, '),
        (dict(model='overlock_xt_reparam'), 'overlock_xt_reparam is folded for inference; train overlock_xt.'),
        (dict(model='overlock_xt_reparam.in1k'), 'overlock_xt_reparam is folded for inference; train overlock_xt.'),
        (dict(lr=None), 'The learning rate for 10 images in an update is 9.77e-06, below the 1.00e-05'),
        (dict(aa='foo'), "takes the name of one of timm's augmentations, such as rand-m9-mstd0.5-inc1, "),
        (dict(opt='adamm'), 'timm cannot build the optimizer adamm ('),
        (dict(batch_size=32), 'has 20 images, fewer than the 32 of one update; lower --batch-size.'),
        (dict(initial_checkpoint='absent.pth'), 'The weight file absent.pth does not exist'),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(drawn, recipe, tmp_path, settings, sentence):
    with pytest.raises(UserError) as error:
        train(recipe(**settings), drawn, tmp_path / 'run')
    assert sentence in str(error.value)
    assert not (tmp_path / 'run').exists()


def test_an_unknown_device_is_one_sentence(drawn, recipe, tmp_path):
    for device in ('tpu9', 'meta'):
        with pytest.raises(UserError, match=f'--device takes .*cuda or cpu, got {device}'):
            train(recipe(), drawn, tmp_path, device=device)


def test_a_run_in_the_way_is_not_overwritten_by_another_that_is_resumed(drawn, recipe, trained, tmp_path):
    train(recipe(epochs=1, warmup_epochs=0), drawn, tmp_path)
    before = (tmp_path / 'last.pth').read_bytes()
    with pytest.raises(UserError, match='is of another run than .* and would be overwritten; name another folder'):
        train(recipe(epochs=2), drawn, tmp_path, resume=str(trained / 'last.pth'))
    assert (tmp_path / 'last.pth').read_bytes() == before


def test_an_output_that_is_a_file_is_told_before_training(drawn, recipe, tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='The output .*file is a file, expected a folder'):
        train(recipe(), drawn, tmp_path / 'file')


def test_fine_tuning_starts_from_the_averaged_weights_of_a_run(trained):
    tensors, name = starting_weights(str(trained / 'last.pth'))
    average = overlock.checkpoint.load(trained / 'last.pth', ema=True)
    torch.testing.assert_close(tensors, average, rtol=0, atol=0)
    assert name.endswith('last.pth (EMA)')


@pytest.fixture(scope='module')
def trained(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    settings = dict(model='overlock_tiny', img_size=32, batch_size=10, workers=0, lr=1e-3, cooldown_epochs=0, amp=False)
    train(Recipe(epochs=1, warmup_epochs=0, **settings), drawn, folder)
    return folder


@pytest.mark.parametrize(
    ('settings', 'sentence'),
    [
        (
            dict(model='overlock_xt'),
            'was trained with model = overlock_tiny and cannot be resumed with overlock_xt; take the same.',
        ),
        (dict(aux_weight=0), 'was trained with aux_weight = 0.4 and cannot be resumed with 0.0'),
        (dict(layer_decay=0.7), 'was trained with layer_decay = None and cannot be resumed with 0.7'),
        (dict(opt='sgd'), 'was trained with opt = adamw and cannot be resumed with sgd'),
        (dict(model_ema=False), 'was trained with model_ema = True and cannot be resumed with False'),
    ],
)
def test_resume_refuses_what_does_not_fit(drawn, recipe, trained, settings, sentence):
    with pytest.raises(CheckpointError) as error:
        train(recipe(**settings), drawn, trained, resume='auto')
    assert sentence in str(error.value)


def test_resume_refuses_weights_that_are_not_finite(drawn, recipe, trained, tmp_path):
    content = read_checkpoint(trained / 'last.pth')
    content['state_dict']['head.fc.bias'][0] = math.nan
    torch.save(content, tmp_path / 'last.pth')
    with pytest.raises(CheckpointError, match='holds 1 tensors that are not finite .first head.fc.bias.; start'):
        train(recipe(), drawn, tmp_path, resume='auto')


def test_resume_refuses_other_classes(drawn, recipe, trained, tmp_path):
    for split in ('train', 'val'):
        for name in ('dots', 'stars'):
            (tmp_path / split / name).mkdir(parents=True)
            for path in (drawn / 'train' / name).iterdir():
                (tmp_path / split / name / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match=r'was trained on other classes \(10\) than the image folder has \(2\)'):
        train(recipe(batch_size=2), tmp_path, trained, resume='auto')


def test_resume_of_what_is_no_checkpoint_is_one_sentence(drawn, recipe, tmp_path):
    torch.save({'a': torch.zeros(1)}, tmp_path / 'weights.pth')
    (tmp_path / 'text.pth').write_text('text')
    for name, sentence in (
        ('absent.pth', 'does not exist'),
        ('weights.pth', 'holds weights, but no state of a'),
        ('text.pth', 'is not a whole PyTorch checkpoint'),
    ):
        with pytest.raises(UserError, match=sentence):
            train(recipe(), drawn, tmp_path / 'run', resume=str(tmp_path / name))


def test_resuming_a_run_at_its_end_changes_nothing(drawn, recipe, trained):
    before = (trained / 'last.pth').read_bytes()
    assert len(train(recipe(epochs=1, warmup_epochs=0), drawn, trained, resume='auto')) == 1
    assert (trained / 'last.pth').read_bytes() == before


def test_resume_does_not_ask_for_the_weights_of_the_start(drawn, recipe, trained, monkeypatch):
    monkeypatch.setattr(Trainer, 'fit', lambda self, writer=None: self.epoch)
    assert train(recipe(initial_checkpoint='absent.pth'), drawn, trained, resume='auto') == 1


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_autocast_trains_and_keeps_the_weights_in_float32(drawn, recipe, tmp_path, dtype):
    rows = train(recipe(model='overlock_wide', amp=True, amp_dtype=dtype, epochs=5), drawn, tmp_path)
    assert rows[-1]['train_loss'] == pytest.approx(1.4 * math.log(10), rel=0.3)
    content = read_checkpoint(tmp_path / 'last.pth')
    assert {tensor.dtype for tensor in content['state_dict'].values()} == {torch.float32, torch.int64}
    # The scale of the gradients falls until none overflows; updates before that are left out.
    assert content['optimizer']['state']
    assert (content['amp_scaler'].get('scale', 1) > 1) == (dtype == 'float16')


def test_moganet_trains_resumes_and_is_validated(drawn, recipe, tmp_path):
    settings = dict(model='moganet_tiny', aux_weight=0, sync_bn=False)
    train(recipe(epochs=1, warmup_epochs=0, **settings), drawn, tmp_path)
    rows = train(recipe(epochs=2, warmup_epochs=0, **settings), drawn, tmp_path, resume='auto')
    assert len(rows) == 2 and rows[0]['train_loss'] == pytest.approx(math.log(10), rel=0.3)
    found = validate(drawn, checkpoint=str(tmp_path / 'last.pth'), workers=0, batch_size=10)
    assert found.figures['top1'] == rows[-1]['val_top1']
    with pytest.raises(UserError, match='moganet_tiny has no auxiliary head; train with aux_weight 0'):
        train(recipe(model='moganet_tiny'), drawn, tmp_path / 'aux')


def test_other_settings_on_resume_are_told(drawn, recipe, trained, monkeypatch, caplog):
    monkeypatch.setattr(Trainer, 'fit', lambda self, writer=None: None)
    train(recipe(epochs=5, lr=2e-3), drawn, trained, resume='auto')
    assert 'Resumed with other settings' in caplog.text
    assert 'epochs 1 -> 5' in caplog.text and 'lr 0.001 -> 0.002' in caplog.text


def test_a_run_is_not_overwritten_unless_resumed(drawn, recipe, trained):
    with pytest.raises(UserError, match='last.pth is there already; go on with --resume, or name another folder'):
        train(recipe(), drawn, trained)


def test_auto_resume_of_an_empty_folder_starts_anew(drawn, recipe, tmp_path, caplog):
    with caplog.at_level('INFO', 'imagenet_overlock'):
        rows = train(recipe(epochs=1, warmup_epochs=0), drawn, tmp_path / 'run', resume='auto')
    assert len(rows) == 1
    assert 'the run starts anew' in caplog.text
