"""The package's own models."""

import pytest
import torch

from ddp_lib import TrainConfig, UserError
from ddp_lib.model import SimpleModel, WideModel, build_model, conv_block


@pytest.mark.parametrize("name", ["SimpleModel", "WideModel"])
@pytest.mark.parametrize("side", [10, 32, 100])
def test_a_model_gives_logits_for_images_of_any_allowed_size(name, side):
    model = build_model(f"ddp_lib.model:{name}", 7)
    logits = model(torch.randn(3, 3, side, side))
    assert logits.shape == (3, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_smaller_images_are_refused():
    assert TrainConfig(image_size=10)
    with pytest.raises(UserError, match="--image-size is 9: give a number of pixels from 10"):
        TrainConfig(image_size=9)


@pytest.mark.parametrize(("channels_in", "channels_out"), [(4, 4), (4, 12), (12, 4)])
def test_a_convolution_begins_by_handing_its_input_on(channels_in, channels_out):
    convolution = conv_block(channels_in, channels_out)[0]
    x = torch.randn(2, channels_in, 6, 6)
    handed_on = min(channels_in, channels_out)
    torch.testing.assert_close(convolution(x)[:, :handed_on], x[:, :handed_on])
    assert convolution(x)[:, handed_on:].abs().sum() > 0 or channels_out <= channels_in


def test_the_wide_model_has_the_same_layers():
    names = [[name for name, _ in model().named_parameters()] for model in (SimpleModel, WideModel)]
    assert names[0] == names[1]
