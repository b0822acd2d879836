from pathlib import Path

import pytest
from mmengine.config import Config

from mmengine_overlock.config import (
    draw_predictions,
    enable_auto_scale_lr,
    load_config,
    save_predictions,
    set_data_root,
    set_weights,
    use_tta,
)
from overlock.utils.errors import UserError


def coco(root='data/coco/'):
    return dict(type='CocoDataset', data_root=root, ann_file='annotations/a.json', data_prefix=dict(img='train/'))


def test_data_root_moves_every_dataset_and_evaluator(tmp_path):
    cfg = Config(
        dict(
            data_root='data/coco/',
            train_dataloader=dict(
                dataset=dict(
                    type='RepeatDataset',
                    times=2,
                    dataset=dict(
                        type='ConcatDataset',
                        datasets=[coco(), dict(type='ClassBalancedDataset', dataset=coco('other/root'))],
                    ),
                )
            ),
            val_dataloader=dict(dataset=coco() | dict(ann_file='data/coco/annotations/b.json')),
            test_dataloader=dict(dataset=coco('data/coco')),
            val_evaluator=[
                dict(type='CocoMetric', ann_file='data/coco/annotations/b.json'),
                dict(type='Other', path='other/root/maps/', unrelated='data/coconut/x'),
            ],
            test_evaluator=dict(type='CocoMetric', ann_file='data/coco/annotations/c.json'),
        )
    )
    root = str(tmp_path)
    set_data_root(cfg, root)
    datasets = cfg.train_dataloader.dataset.dataset.datasets
    assert Path(datasets[0].data_root) == Path(datasets[1].dataset.data_root) == tmp_path
    assert datasets[0].ann_file == 'annotations/a.json' and datasets[0].data_prefix.img == 'train/'
    assert cfg.val_dataloader.dataset.ann_file == f'{root}/annotations/b.json'
    assert Path(cfg.test_dataloader.dataset.data_root) == tmp_path
    assert cfg.val_evaluator[0].ann_file == f'{root}/annotations/b.json'
    assert cfg.val_evaluator[1] == dict(type='Other', path=f'{root}/maps/', unrelated='data/coconut/x')
    assert cfg.test_evaluator.ann_file == f'{root}/annotations/c.json'
    assert Path(cfg.data_root) == tmp_path


def test_data_root_of_the_current_folder_leaves_relative_names_alone(tmp_path):
    cfg = Config(dict(train_dataloader=dict(dataset=coco('./')), val_evaluator=dict(ann_file='./annotations/a.json')))
    set_data_root(cfg, tmp_path)
    assert cfg.train_dataloader.dataset.ann_file == 'annotations/a.json'
    assert cfg.val_evaluator.ann_file == str(tmp_path / 'annotations/a.json')


def test_data_root_must_exist_and_have_something_to_replace(tmp_path):
    cfg = Config(dict(train_dataloader=dict(dataset=dict(type='ToyDataset'))))
    with pytest.raises(UserError, match='absent given by --data-root does not exist'):
        set_data_root(cfg, tmp_path / 'absent')
    with pytest.raises(UserError, match='no data set .* has a data_root'):
        set_data_root(cfg, tmp_path)


def test_weights_replace_the_backbones_alone(tmp_path):
    cfg = Config(
        dict(
            model=dict(
                type='Detector',
                backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='https://example.invalid/a.pth')),
                neck=dict(init_cfg='kept'),
            )
        )
    )
    path = tmp_path / 'w.pth'
    with pytest.raises(UserError, match='weight file .*w.pth does not exist'):
        set_weights(cfg, str(path))
    path.touch()
    set_weights(cfg, str(path))
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint=str(path))
    assert cfg.model.neck.init_cfg == 'kept'


def test_auto_scale_lr_needs_the_batch_size_of_the_learning_rate():
    with pytest.raises(UserError, match='base_batch_size'):
        enable_auto_scale_lr(Config(dict(auto_scale_lr=dict(enable=False))))
    cfg = Config(dict(auto_scale_lr=dict(enable=False, base_batch_size=16)))
    enable_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=16)


def test_tta_needs_a_model_and_a_pipeline():
    for given, missing in (({}, 'tta_model'), (dict(tta_model=dict(type='DetTTAModel')), 'tta_pipeline')):
        with pytest.raises(UserError, match=f'--tta needs `{missing}`'):
            use_tta(Config(given))


def test_tta_wraps_the_model_and_tests_boxes_alone_in_mmdet():
    cfg = Config(
        dict(
            model=dict(type='MaskRCNN'),
            tta_model=dict(type='DetTTAModel'),
            tta_pipeline=[dict(type='TestTimeAug')],
            test_dataloader=dict(dataset=dict(type='RepeatDataset', dataset=dict(pipeline=[dict(type='Resize')]))),
            test_evaluator=dict(type='CocoMetric', metric=['bbox', 'segm']),
        )
    )
    use_tta(cfg)
    assert cfg.model == dict(type='DetTTAModel', module=dict(type='MaskRCNN'))
    assert cfg.test_dataloader.dataset.dataset.pipeline == [dict(type='TestTimeAug')]
    assert cfg.test_evaluator.metric == 'bbox'
    assert cfg.custom_hooks == [dict(type='BoxesOnlyHook')]


@pytest.mark.parametrize('scope, kind', [('mmdet', 'DumpDetResults'), ('mmseg', 'DumpSegResults')])
def test_predictions_are_saved_beside_the_evaluation(scope, kind):
    cfg = Config(dict(default_scope=scope, test_evaluator=dict(type='Metric')))
    with pytest.raises(UserError, match=r'ends in .pkl or .pickle, got a.json'):
        save_predictions(cfg, 'a.json')
    save_predictions(cfg, 'a.pkl')
    assert cfg.test_evaluator == [dict(type='Metric'), dict(type=kind, out_file_path='a.pkl')]


def test_every_test_image_is_drawn_into_the_given_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='need the hook `visualization`'):
        draw_predictions(Config(dict(default_hooks=dict())), 'drawn')
    det = Config(dict(default_hooks=dict(visualization=dict(type='DetVisualizationHook'))))
    draw_predictions(det, 'drawn')
    hook = det.default_hooks.visualization
    assert hook.draw and hook.test_out_dir == str(tmp_path / 'drawn')
    seg = Config(
        dict(visualizer=dict(), default_hooks=dict(visualization=dict(type='SegVisualizationHook', interval=50)))
    )
    draw_predictions(seg, 'drawn')
    assert seg.default_hooks.visualization.interval == 1 and seg.visualizer.save_dir == str(tmp_path / 'drawn')


def test_a_missing_configuration_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match='absent.py does not exist'):
        load_config(tmp_path / 'absent.py')


def test_a_failed_import_names_its_root(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / 'needs_more.py').write_text('import no_such_package')
    path = tmp_path / 'a.py'
    path.write_text("custom_imports = dict(imports=['needs_more'], allow_failed_imports=False)")
    with pytest.raises(UserError, match="a.py needs a module that cannot be imported .*'no_such_package'"):
        load_config(path)


def test_options_go_over_the_configuration(write_toy):
    cfg = load_config(write_toy(), {'model.backbone.width': 3, 'work_dir': 'b'})
    assert cfg.model.backbone.width == 3 and cfg.work_dir == 'b'
    path = write_toy()
    assert load_config(path).work_dir == f'work_dirs/{path.stem}'
    assert load_config(path, work_dir='a').work_dir == 'a'
    with pytest.raises(UserError, match='--cfg-options do not fit'):
        load_config(path, {'param_scheduler.7.gamma': 1})
