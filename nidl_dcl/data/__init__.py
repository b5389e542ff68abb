"""From images to batches of two views: tables, splits, datasets, samplers, loaders, augmentations.

MONAI is used here. Networks and losses are left to `nidl_dcl.models`.
"""
