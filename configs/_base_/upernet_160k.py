# UperNet on ADE20K, 160k iterations.
_base_ = ['models/upernet.py', 'datasets/ade20k.py', 'schedules/ade20k_160k.py', 'seg_runtime.py']
