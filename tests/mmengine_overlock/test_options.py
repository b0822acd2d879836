"""Settings beside a configuration: taken where something reads them, refused by name where nothing does."""

import pytest

from mmengine_overlock.config import load_config
from mmengine_overlock.options import check_options
from overlock.utils.configs import find_config
from overlock.utils.errors import UserError

DET, SEG = 'mask_rcnn_overlock_xt_1x', 'upernet_overlock_xt_160k'


@pytest.fixture(scope='module')
def configs():
    return {name: load_config(find_config(name)) for name in (DET, SEG)}


@pytest.mark.parametrize(
    ('name', 'key', 'said'),
    [
        (DET, 'optim_wraper.optimizer.lr', 'it has no optim_wraper; did you mean optim_wrapper.optimizer.lr?'),
        (DET, 'optim_wrapper.optimiser.lr', 'optim_wrapper has no optimiser; did you mean optim_wrapper.optimizer.lr?'),
        (DET, 'optim_wrapper.optimizer.wieght_decay', 'did you mean optim_wrapper.optimizer.weight_decay?'),
        (DET, 'optim_wrapper.paramwise_cfg.norm_decay_mul', 'did you mean optim_wrapper.paramwise_cfg.norm_decay_mult'),
        (DET, 'model.backbone.with_cpp', 'model.backbone has no with_cpp; did you mean model.backbone.with_cp?'),
        (DET, 'model.roi_head.bbox_head.num_clases', 'did you mean model.roi_head.bbox_head.num_classes?'),
        (DET, 'model.test_cfg.rcnn.score_threshold', 'model.test_cfg.rcnn has no score_threshold'),
        (DET, 'train_dataloader.batchsize', 'did you mean train_dataloader.batch_size?'),
        (DET, 'train_dataloader.dataset.pipelin', 'did you mean train_dataloader.dataset.pipeline?'),
        (DET, 'train_dataloader.dataset.indizes', 'did you mean train_dataloader.dataset.indices?'),
        (DET, 'train_cfg.max_epoch', 'did you mean train_cfg.max_epochs?'),
        (DET, 'param_scheduler.0.gama', 'param_scheduler.0 has no gama'),
        (DET, 'default_hooks.chekpoint.interval', 'did you mean default_hooks.checkpoint.interval?'),
        (DET, 'auto_scale_lr.enabled', 'did you mean auto_scale_lr.enable?'),
        (DET, 'qqq', 'it has no qqq; give a key that is there, or write it into the file.'),
        (SEG, 'model.decode_head.num_class', 'did you mean model.decode_head.num_classes?'),
        (SEG, 'model.decode_head.sampler_', 'did you mean model.decode_head.sampler?'),
        (SEG, 'train_pipeline', 'set train_dataloader.dataset.pipeline.'),
        (DET, 'data_root', 'set train_dataloader.dataset.data_root and val_dataloader.dataset.data_root and'),
    ],
)
def test_a_setting_that_nothing_reads_is_one_sentence(configs, name, key, said):
    with pytest.raises(UserError) as error:
        check_options(configs[name], {key: 1})
    assert said in str(error.value) and key in str(error.value)


@pytest.mark.parametrize(
    ('name', 'key'),
    [
        (DET, 'model.backbone.with_cp'),
        (DET, 'model.backbone.init_cfg.checkpoint'),
        (DET, 'model.roi_head.bbox_head.reg_decoded_bbox'),
        (DET, 'resume'),
        (DET, 'load_from'),
        (DET, 'work_dir'),
        (DET, 'randomness.seed'),
        (DET, 'auto_scale_lr.enable'),
        (DET, 'env_cfg.dist_cfg.timeout'),
        (DET, 'find_unused_parameters'),
        (DET, 'optim_wrapper.accumulative_counts'),
        (DET, 'optim_wrapper.clip_grad.max_norm'),
        (DET, 'optim_wrapper.optimizer.amsgrad'),
        (DET, 'optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult'),
        (DET, 'train_dataloader.prefetch_factor'),
        (DET, 'train_dataloader.dataset.metainfo.classes'),
        (DET, 'train_dataloader.dataset.indices'),
        (DET, 'train_cfg.val_begin'),
        (DET, 'param_scheduler.0.begin'),
        (DET, 'param_scheduler.0.verbose'),
        (DET, 'default_hooks.checkpoint.published_keys'),
        (DET, 'default_hooks.timer.priority'),
        (DET, 'test_evaluator.outfile_prefix'),
        (DET, 'visualizer.line_width'),
        (DET, 'model.test_cfg.rcnn._delete_'),
        (SEG, 'model.test_cfg.stride'),
        (SEG, 'model.test_cfg.crop_size'),
        (SEG, 'model.decode_head.dropout_ratio'),
        (SEG, 'model.decode_head.ignore_index'),
        (SEG, 'test_evaluator.output_dir'),
        (SEG, 'train_dataloader.dataset.img_suffix'),
    ],
)
def test_a_setting_that_something_reads_is_taken(configs, name, key):
    check_options(configs[name], {key: 1})


def test_a_new_part_with_a_type_is_taken_and_a_new_type_brings_its_own_arguments(configs):
    options = {'default_hooks.mine.type': 'EMAHook', 'default_hooks.mine.momentum': 0.1}
    check_options(configs[DET], options)
    options = {'optim_wrapper.optimizer.type': 'SGD', 'optim_wrapper.optimizer.momentum': 0.9}
    check_options(configs[DET], options)
    with pytest.raises(UserError, match='did you mean optim_wrapper.optimizer.momentum'):
        check_options(configs[DET], {'optim_wrapper.optimizer.type': 'SGD', 'optim_wrapper.optimizer.momentun': 0.9})


def test_train_refuses_it_before_anything_starts(write_toy, tmp_path, run_tool):
    code, out, err = run_tool('train', write_toy(), '--cfg-options', 'optim_wraper.optimizer.lr=1')
    assert (code, out) == (2, '')
    assert err.endswith('it has no optim_wraper; did you mean optim_wrapper.optimizer.lr?\n') and err.count('\n') == 1
    assert not (tmp_path / 'work_dirs').exists()
