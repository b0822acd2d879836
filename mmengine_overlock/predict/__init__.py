"""Predict images and videos with trained or exported detectors and segmenters."""

from mmengine_overlock.predict.network import Network, build_model, dataset_meta, test_pipeline
from mmengine_overlock.predict.pictures import Picture, Pictures
from mmengine_overlock.predict.predictor import Predictor

__all__ = ['Network', 'Picture', 'Pictures', 'Predictor', 'build_model', 'dataset_meta', 'test_pipeline']
