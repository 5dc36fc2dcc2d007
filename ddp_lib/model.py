"""SimpleModel: the plain convolutional network that the course trains.

Edit it, or name a model of your own with --model package.module:callable.
"""

import inspect
import os
import sys
from collections.abc import Callable
from importlib import import_module

import torch
from torch import nn

from ddp_lib.errors import UserError


def conv_block(channels_in: int, channels_out: int, pool: bool = False) -> nn.Sequential:
    """3x3 convolution, BatchNorm, ReLU: (B, channels_in, H, W) -> (B, channels_out, H, W). With `pool`,
    height and width are halved."""
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
    # It begins by handing its input on, beside random channels: with few epochs, that is a head start. From
    # Zagoruyko and Komodakis, "DiracNets" (2017).
    nn.init.dirac_(convolution.weight[:channels_in])
    return nn.Sequential(
        convolution,
        nn.MaxPool2d(2) if pool else nn.Identity(),  # before the next two: a quarter to compute
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class SimpleModel(nn.Module):
    """Seven convolutions and one linear layer for images (B, 3, 32, 32); returns logits (B, num_classes).

    30 million multiplications per image, and 628 thousand parameters. The order of the layers is that of
    Jordan's "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024).
    """

    widths = (32, 96, 192)  # channels of the three stages

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        first, second, third = self.widths
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 24, kernel_size=3), nn.ReLU(inplace=True)),  # (B, 24, 30, 30)
            conv_block(24, first, pool=True),  # (B, 32, 15, 15)
            conv_block(first, first),
            conv_block(first, second, pool=True),  # (B, 96, 7, 7)
            conv_block(second, second),
            conv_block(second, third, pool=True),  # (B, 192, 3, 3)
            conv_block(third, third),
            nn.AdaptiveMaxPool2d(1),  # (B, 192, 1, 1)
        )
        self.classifier = nn.Linear(third, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # Scaled down: the maximum over the image makes logits large, and the first losses would jump about.
        return 0.2 * self.classifier(self.features(images).flatten(1))


class WideModel(SimpleModel):
    """SimpleModel with wider layers: 4 times the multiplications, for a higher accuracy."""

    widths = (64, 256, 256)


def build_model(spec: str, num_classes: int) -> nn.Module:
    """The model that `package.module:callable` returns when it is called with num_classes=...

    The working directory is searched last. UserError if the callable cannot be found, has no such parameter,
    or returns no torch.nn.Module with a parameter to train. What the reader's code raises is not caught.
    """
    module_name, _, name = spec.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # at the end: its queue.py must not replace Python's
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # an import inside the module
        raise UserError(
            f"--model {spec!r} cannot be found ({error}): write package.module:callable, "
            "with the module in the working directory or installed"
        ) from error
    make = getattr(module, name, None)
    if make is None:
        raise UserError(f"--model {spec!r} cannot be found: {module.__file__} has no {name}")
    if isinstance(make, nn.Module) or not callable(make):
        raise UserError(
            f"--model {spec!r} is a {type(make).__name__}: name the class, or a function that returns a model"
        )
    if not _takes_num_classes(make):
        raise UserError(
            f"--model {spec!r} cannot be called with num_classes={num_classes} alone: give it a parameter of "
            "that name, and every other parameter a default"
        )
    model = make(num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise UserError(f"--model {spec!r} returns a {type(model).__name__}: return a torch.nn.Module")
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"--model {spec!r} has no parameter to train: set requires_grad on at least one")
    return model


def _takes_num_classes(make: Callable[..., object]) -> bool:
    try:
        inspect.signature(make).bind(num_classes=1)
    except ValueError:  # it has no signature that Python can read
        return True
    except TypeError:
        return False
    return True
