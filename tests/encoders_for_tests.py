"""Encoders that tests name as package.module:Class; without batch statistics."""

from __future__ import annotations

import os
import signal

import torch
from torch import Tensor, nn


class GroupNormed(nn.Sequential):
    n_features = 8

    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(1, 8, 3, 2, 1),
            nn.GroupNorm(2, 8),
            nn.GELU(),
            nn.Conv3d(8, 8, 3, 2, 1),
            nn.GroupNorm(2, 8),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
        )


class Failing(GroupNormed):
    """Fails in the process that FAIL_RANK names, at its third batch, in the way that FAIL_HOW says."""

    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.steps += 1
        if self.steps == 3 and os.environ.get("RANK", "0") == os.environ.get("FAIL_RANK"):
            how = os.environ["FAIL_HOW"]
            if how == "raise":
                raise OSError(5, "Input/output error", "sub-07.nii.gz")
            os.kill(os.getpid(), signal.Signals[how])
        return super().forward(x)
