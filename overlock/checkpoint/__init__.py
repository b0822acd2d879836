"""Weights: the published ones, their names and ours, safe reading, and loading with a report."""

from overlock.checkpoint.download import find_file
from overlock.checkpoint.fitting import LoadReport, load_pretrained, load_state_dict
from overlock.checkpoint.reading import load
from overlock.checkpoint.registry import WEIGHTS, Weights
from overlock.models.names import from_published, to_published
from overlock.utils.errors import CheckpointError

__all__ = [
    'WEIGHTS',
    'CheckpointError',
    'LoadReport',
    'Weights',
    'find_file',
    'from_published',
    'load',
    'load_pretrained',
    'load_state_dict',
    'to_published',
]
