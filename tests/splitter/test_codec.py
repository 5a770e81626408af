"""Balancing at the output of a decoder, with a discriminator: claims of docs/how_to/codec_gan.md."""

import copy

import pytest
import torch
from torch import nn

from balance import Splitter

SHARES = {"waveform": 1.0, "adversarial": 3.0}


class Codec:
    """A decoder with a splitter at its output, a discriminator, and a further loss on the code of the encoder."""

    def __init__(self, scale=1.0, **options):
        torch.manual_seed(0)
        self.encoder, self.decoder, self.discriminator = nn.Linear(6, 3), nn.Linear(3, 6), nn.Linear(6, 1)
        self.signal, self.scale = torch.randn(8, 6), scale
        self.splitter = Splitter(tuple(SHARES), gradient="ema_norm", gradient_options={"shares": [*SHARES.values()], **options})

    def output(self):
        return self.decoder(self.encoder(self.signal).tanh())

    def losses(self, views):
        return {
            "waveform": self.scale * (views["waveform"] - self.signal).square().mean(),
            "adversarial": -self.discriminator(views["adversarial"].sin()).mean(),
        }

    def commitment(self):
        return 0.1 * self.encoder(self.signal).square().mean()

    def generator_step(self, *, commitment=False):
        losses = self.losses(self.splitter(self.output()))
        (sum(losses.values()) + (self.commitment() if commitment else 0)).backward()

    def gradients(self, module):
        return [parameter.grad for parameter in module.parameters()]


def gradients_at_output(codec):
    output = codec.output().detach().requires_grad_()
    losses = codec.losses(dict.fromkeys(SHARES, output))
    return output, [torch.autograd.grad(loss, output)[0] for loss in losses.values()]


@pytest.mark.parametrize("total", [1.0, 5.0])
def test_each_loss_has_its_share_of_the_gradient_at_the_output(total):
    codec = Codec(total_norm=total)
    first, second = gradients_at_output(codec)[1]
    merged = total * (0.25 * first / first.norm() + 0.75 * second / second.norm())
    expected = torch.autograd.grad(codec.output(), codec.decoder.parameters(), merged)
    codec.generator_step()
    for gradient, by_hand in zip(codec.gradients(codec.decoder), expected, strict=True):
        torch.testing.assert_close(gradient, by_hand)


def test_a_factor_on_a_loss_has_no_effect_on_the_decoder():
    plain, scaled = Codec(), Codec(scale=1000.0)
    for codec in (plain, scaled):
        codec.generator_step()
        codec.generator_step()
    for pair in zip(plain.gradients(plain.decoder), scaled.gradients(scaled.decoder), strict=True):
        torch.testing.assert_close(*pair)


def test_a_loss_elsewhere_is_added_unchanged():
    codec, other = Codec(), Codec()
    codec.generator_step(commitment=True)
    other.generator_step()
    added = torch.autograd.grad(other.commitment(), other.encoder.parameters())
    for both, balanced, alone in zip(codec.gradients(codec.encoder), other.gradients(other.encoder), added, strict=True):
        torch.testing.assert_close(both, balanced + alone)
    for pair in zip(codec.gradients(codec.decoder), other.gradients(other.decoder), strict=True):
        assert torch.equal(*pair)


def test_a_frozen_discriminator_changes_no_gradient_of_the_generator():
    codec, frozen = Codec(), Codec()
    frozen.discriminator.requires_grad_(False)
    for either in (codec, frozen):
        either.generator_step()
    assert all(gradient is not None for gradient in codec.gradients(codec.discriminator))
    assert frozen.gradients(frozen.discriminator) == [None, None]
    for module in ("encoder", "decoder"):
        for pair in zip(codec.gradients(getattr(codec, module)), frozen.gradients(getattr(frozen, module)), strict=True):
            assert torch.equal(*pair)


def test_a_step_of_the_discriminator_on_a_detached_output_touches_nothing_else():
    codec = Codec()
    before = copy.deepcopy(codec.splitter.state_dict())
    codec.discriminator(codec.output().detach()).mean().backward()
    assert codec.gradients(codec.decoder) == [None, None]
    assert all(torch.equal(value, before[name]) for name, value in codec.splitter.state_dict().items())


def test_a_step_of_the_discriminator_through_a_view_changes_the_averages():
    """The trap of the page."""
    codec = Codec()
    codec.discriminator(codec.splitter(codec.output())["adversarial"]).mean().backward()
    assert codec.gradients(codec.decoder) != [None, None]
    assert codec.splitter.gradient_balancer.rule.counts.tolist() == [0, 1]


def test_an_adversarial_loss_that_begins_later():
    codec = Codec()
    codec.losses(codec.splitter(codec.output()))["waveform"].backward()
    report, rule = codec.splitter.report, codec.splitter.gradient_balancer.rule
    assert report.tasks == ("waveform",)
    assert (report.gramian.sqrt() * report.gradient_weights).item() == pytest.approx(1)
    assert rule.counts.tolist() == [1, 0]
    codec.generator_step()
    assert rule.counts.tolist()[1] == 1


def test_a_gradient_penalty_through_the_splitter_is_refused():
    codec = Codec()
    views = codec.splitter(codec.output())
    gradient = torch.autograd.grad(codec.losses(views)["waveform"], codec.decoder.weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_a_checkpoint_continues_the_averages():
    undisturbed, resumed = Codec(decay=0.9), Codec(decay=0.9)
    undisturbed.generator_step()
    resumed.splitter.load_state_dict(undisturbed.splitter.state_dict())
    for codec in (undisturbed, resumed):
        codec.decoder.zero_grad()
        codec.scale = 7.0
        codec.generator_step()
    for pair in zip(undisturbed.gradients(undisturbed.decoder), resumed.gradients(resumed.decoder), strict=True):
        assert torch.equal(*pair)
