"""Layers computed again: the same gradients, whichever side the inputs are kept on."""

import pytest
import torch
from torch import Tensor, nn

from wake2vec.checkpointing import Checkpointing, HostStash

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Layer(nn.Module):
    def __init__(self, in_tuple: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.in_tuple = in_tuple
        self.calls = 0

    def forward(self, hidden_BTD: Tensor, scale: float = 1.0) -> Tensor | tuple[Tensor]:
        self.calls += 1
        out_BTD = hidden_BTD + torch.tanh(self.linear(hidden_BTD)) * scale
        return (out_BTD,) if self.in_tuple else out_BTD


def gradient(layers: list[Layer], start_BTD: Tensor, wrap: Checkpointing | None) -> Tensor:
    start_BTD = start_BTD.clone().requires_grad_()
    hidden_BTD = start_BTD * 1.0
    for layer in layers:
        output = layer(hidden_BTD, 0.5) if wrap is None else wrap(layer, hidden_BTD, 0.5)
        hidden_BTD = output[0] if layer.in_tuple else output
    hidden_BTD.square().sum().backward()
    assert start_BTD.grad is not None
    return start_BTD.grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("in_tuple", [False, True])
def test_gradient_is_the_plain_one(device: str, offloaded: bool, in_tuple: bool) -> None:
    torch.manual_seed(0)
    layers = [Layer(in_tuple).to(device).requires_grad_(False) for _ in range(5)]
    start_BTD = torch.randn(2, 3, 8, device=device)
    wrap = Checkpointing(HostStash() if offloaded else None)
    expected = gradient(layers, start_BTD, None)
    for _ in range(3):  # the buffers are used again
        assert torch.equal(gradient(layers, start_BTD, wrap), expected)
    assert [layer.calls for layer in layers] == [7] * 5


@pytest.mark.parametrize("device", DEVICES)
def test_stash_takes_other_shapes_and_forgets_an_unfinished_pass(device: str) -> None:
    torch.manual_seed(0)
    layers = [Layer().to(device).requires_grad_(False) for _ in range(3)]
    stash = HostStash()
    wrap = Checkpointing(stash)
    for shape in ((2, 3, 8), (1, 3, 8), (4, 3, 8)):
        start_BTD = torch.randn(shape, device=device)
        wrap(layers[0], start_BTD.clone().requires_grad_(), 0.5)  # a signal ends a pass in the middle
        stash.clear()
        assert torch.equal(gradient(layers, start_BTD, wrap), gradient(layers, start_BTD, None))


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    stash = HostStash()
    layer = Layer()
    with torch.no_grad():
        Checkpointing(stash)(layer, torch.randn(1, 2, 8))
    assert layer.calls == 1
    assert stash._buffers == []
