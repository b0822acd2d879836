"""Weights: published names and ours, safe reading of files, and loading that tells what it did."""

from overlock.checkpoint.files import CheckpointError, find_file, read_state_dict
from overlock.checkpoint.loading import LoadReport, load_pretrained, load_state_dict
from overlock.checkpoint.names import from_published, to_published

__all__ = ['CheckpointError', 'LoadReport', 'find_file', 'from_published', 'load_pretrained', 'load_state_dict',
           'read_state_dict', 'to_published']
