"""Recipes: the published settings, and clear sentences for wrong ones."""

import argparse
from dataclasses import fields
from pathlib import Path

import pytest

from imagenet_overlock import Recipe, load_recipe
from imagenet_overlock.model import check_model
from imagenet_overlock.recipe import add_recipe_options, recipe_options
from overlock.utils.errors import UserError

CONFIGS = Path(__file__).parents[2] / 'configs' / 'imagenet'


@pytest.mark.parametrize(('variant', 'drop_path'), [('xt', 0.1), ('t', 0.15), ('s', 0.4), ('b', 0.5)])
def test_recipes_of_the_variants_state_only_model_and_drop_path(variant, drop_path):
    assert load_recipe(CONFIGS / f'overlock_{variant}.yaml') == Recipe(model=f'overlock_{variant}', drop_path=drop_path)


def test_defaults_are_the_published_settings():
    recipe = Recipe()
    assert recipe.total_batch(8) == 2048
    assert recipe.learning_rate(8) == pytest.approx(2e-3)
    published = dict(
        img_size=224,
        epochs=300,
        cooldown_epochs=10,
        sched_on_updates=False,
        train_interpolation='random',
        amp=True,
        amp_dtype='float16',
        opt='adamw',
        weight_decay=0.05,
        warmup_epochs=5,
        clip_grad=5,
        mixup=0.8,
        cutmix=1,
        aa='rand-m9-mstd0.5-inc1',
        reprob=0.25,
        smoothing=0.1,
        aux_weight=0.4,
        model_ema_decay=0.9999,
    )
    assert {name: getattr(recipe, name) for name in published} == published


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.yaml')), ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    recipe = load_recipe(path)
    check_model(recipe.model)
    assert recipe.aux_weight == (0 if recipe.model.startswith('moganet') else 0.4)


@pytest.mark.parametrize(
    ('variant', 'drop_path', 'weight_decay', 'batch', 'aa', 'mixup', 'ema', 'min_lr', 'amp'),
    [
        ('xt', 0.05, 0.03, 1024, 'rand-m7-mstd0.5-inc1', 0.1, False, 1e-6, True),
        ('t', 0.1, 0.04, 1024, 'rand-m7-mstd0.5-inc1', 0.1, False, 1e-6, True),
        ('s', 0.1, 0.05, 1024, 'rand-m9-mstd0.5-inc1', 0.8, True, 1e-5, False),
        ('b', 0.2, 0.05, 1024, 'rand-m9-mstd0.5-inc1', 0.8, True, 1e-5, False),
        ('l', 0.3, 0.05, 1024, 'rand-m9-mstd0.5-inc1', 0.8, True, 1e-5, False),
        ('xl', 0.4, 0.05, 512, 'rand-m9-mstd0.5-inc1', 0.8, True, 1e-5, False),
    ],
)
def test_recipes_of_moganet_are_its_authors(variant, drop_path, weight_decay, batch, aa, mixup, ema, min_lr, amp):
    recipe = load_recipe(CONFIGS / f'moganet_{variant}.yaml')
    assert (recipe.drop_path, recipe.weight_decay, recipe.total_batch(8)) == (drop_path, weight_decay, batch)
    assert (recipe.aa, recipe.mixup, recipe.model_ema, recipe.min_lr, recipe.amp) == (aa, mixup, ema, min_lr, amp)
    assert recipe.learning_rate(8) == pytest.approx(1e-3)
    assert (recipe.epochs, recipe.cooldown_epochs, recipe.warmup_epochs, recipe.warmup_lr) == (300, 10, 5, 1e-5)
    assert (recipe.cutmix, recipe.reprob, recipe.smoothing, recipe.clip_grad) == (1, 0.25, 0.1, 0)
    assert not recipe.sync_bn and not recipe.sched_on_updates and recipe.train_interpolation == 'random'


@pytest.mark.parametrize(
    ('text', 'sentence'),
    [
        ('drop_pth: 0.1', 'has the setting drop_pth, which a recipe does not know; did you mean drop_path?'),
        ('epochs: many', "The setting epochs must be a whole number, got 'many'."),
        ('epochs: 2.5', 'The setting epochs must be a whole number, got 2.5.'),
        ('epochs: true', 'The setting epochs must be a whole number, got True.'),
        ('amp: 1', 'The setting amp must be true or false, got 1.'),
        ('epochs: 0', 'The setting epochs must be at least 1, got 0.'),
        ('lr: .nan', 'The setting lr must be at least 0, got nan.'),
        ('clip_grad: .inf', 'The setting clip_grad must be at least 0, got inf.'),
        ('drop_path: 1.5', 'The setting drop_path must be between 0 and 0.99, got 1.5.'),
        ('model: null', 'The setting model must be text, got None.'),
        ('amp_dtype: half', 'The setting amp_dtype must be float16 or bfloat16, got half.'),
        ('ckpt_stg: [1, 2]', 'The setting ckpt_stg must be four whole numbers, got [1, 2].'),
        ('ckpt_stg: [1, 0, 0, -1]', 'The setting ckpt_stg must be at least 0, got [1, 0, 0, -1].'),
        ('ckpt_stg: [1, 1, 0, 0]', 'ckpt_stg has no effect without grad_checkpointing; add --grad-checkpointing.'),
        ('scale: 0.5', 'The setting scale must be two numbers, got 0.5.'),
        ('scale: [1, 0.5]', 'The setting scale takes the smaller number first, got [1.0, 0.5].'),
        ('warmup_epochs: 300', 'warmup_epochs must be below epochs, got 300.0 of 300; lower warmup_epochs.'),
        ('batch_size: 3', 'need an even batch_size, got 3; take an even one, or set mixup and cutmix to 0.'),
        ('{pretrained: true, initial_checkpoint: a.pth}', 'leave one of them out, by --no-pretrained'),
        ('- 1', 'must hold settings as `name: value`, got a list.'),
        ('a: [', 'is not YAML: '),
        ('!!python/object/apply:os.system [ls]', 'is not YAML: could not determine a constructor'),
    ],
)
def test_a_wrong_recipe_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / 'recipe.yaml'
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert sentence in str(error.value)
    assert '\n' not in str(error.value)


def test_a_missing_recipe_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r'absent.yaml cannot be read \(No such file or directory\); give the path'):
        load_recipe(tmp_path / 'absent.yaml')


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path):
    path = tmp_path / 'recipe.yaml'
    path.write_text('min_lr: 1e-6\nlr: 1')
    recipe = load_recipe(path)
    assert (recipe.min_lr, recipe.lr) == (1e-6, 1.0)


def test_options_override_the_recipe(tmp_path):
    path = tmp_path / 'recipe.yaml'
    path.write_text('model: overlock_t\nepochs: 10\namp: true')
    parser = argparse.ArgumentParser()
    parser.add_argument('--output')
    add_recipe_options(parser)
    args = parser.parse_args(['-b', '8', '--no-amp', '--scale', '0.5', '1', '--output', 'a', '--mixup', '0'])
    options = recipe_options(args)
    assert vars(args) == {'output': 'a'}
    recipe = load_recipe(path, options)
    assert recipe == Recipe(model='overlock_t', epochs=10, batch_size=8, amp=False, scale=(0.5, 1.0), mixup=0.0)


def test_every_setting_is_an_option_with_help():
    parser = argparse.ArgumentParser()
    add_recipe_options(parser)
    options = {action.dest: action.help for action in parser._actions}
    assert all(options[item.name] for item in fields(Recipe))
