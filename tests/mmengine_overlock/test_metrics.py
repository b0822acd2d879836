import pickle

import numpy as np
import torch

from mmengine_overlock.metrics import DumpSegResults


def test_label_maps_are_written_without_logits(tmp_path):
    labels = torch.randint(150, (1, 4, 6))
    metric = DumpSegResults(out_file_path=str(tmp_path / 'a.pkl'))
    sample = dict(img_path='1.jpg', pred_sem_seg=dict(data=labels), seg_logits=dict(data=torch.ones(150, 4, 6)))
    metric.process(None, [sample])
    metric.evaluate(size=1)
    [result] = pickle.loads((tmp_path / 'a.pkl').read_bytes())
    assert set(result) == {'img_path', 'pred_sem_seg'}
    np.testing.assert_array_equal(result['pred_sem_seg'], labels[0])
