"""Write the predictions of a test into a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.evaluator import DumpResults
from mmengine.registry import METRICS


@METRICS.register_module()
class DumpSegResults(DumpResults):
    """Write the predicted map of each image: dicts of `img_path` and `pred_sem_seg`, class indices (H, W) in uint16.

    mmengine's DumpResults would keep the logits of every class too, hundreds of megabytes for one image.
    """

    def process(self, data_batch: Any, predictions: Sequence[dict]) -> None:
        for sample in predictions:
            labels = sample['pred_sem_seg']['data'].squeeze(0).cpu().numpy()
            self.results.append(dict(img_path=sample['img_path'], pred_sem_seg=labels.astype(np.uint16)))
