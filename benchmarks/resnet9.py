"""The larger model for benchmarks/gpu.py: in the folder benchmarks/, --model resnet9:ResNet9."""

import torch
from torch import nn

from ddp_lib.model import Residual, conv_block


class ResNet9(nn.Module):
    """Images (B, 3, 32, 32) in, logits (B, num_classes) out; 6.6 million parameters.

    The network of David Page's "How to train your ResNet" (2018): eight convolutions, one linear layer.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_block(3, 64),
            conv_block(64, 128, pool=True),  # (B, 128, 16, 16)
            Residual(128),
            conv_block(128, 256, pool=True),  # (B, 256, 8, 8)
            conv_block(256, 512, pool=True),  # (B, 512, 4, 4)
            Residual(512),
            nn.AdaptiveMaxPool2d(1),
        )
        self.classifier = nn.Linear(512, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 0.125 * self.classifier(self.features(images).flatten(1))
