import pytest
import torch
from torch import nn

import balance
from experiments.problems import cityscapes, nyuv2
from experiments.problems.base import Network
from experiments.problems.dense.model import UnitLength, build_heads
from experiments.problems.dense.mtan import MTAN
from experiments.problems.dense.segnet import SegNet

NAMES = ("small", "segnet", "mtan")
NARROW = (4, 6, 8)
SHALLOW = (2, 2, 3)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def networks():
    """On no device: counts and shapes need no numbers."""
    with torch.device("meta"):
        return {
            (experiment.__name__.rpartition(".")[2], name): experiment.build_model(experiment.ModelConfig(name))
            for experiment in (nyuv2, cityscapes)
            for name in NAMES
        }


@pytest.mark.parametrize(
    ("experiment", "name", "trunk", "heads"),
    [
        ("nyuv2", "mtan", 44_117_184, 111_889),
        ("nyuv2", "segnet", 24_943_296, 111_889),
        ("nyuv2", "small", 260_304, 7_249),
        ("cityscapes", "mtan", 41_132_608, 74_376),
        ("cityscapes", "segnet", 24_943_296, 74_376),
        ("cityscapes", "small", 260_304, 4_776),
    ],
)
def test_parameters_are_those_of_the_published_networks(networks, experiment, name, trunk, heads):
    network = networks[experiment, name]
    assert (count(network.trunk), count(network.heads)) == (trunk, heads)
    assert count(network) == trunk + heads


def test_totals_and_parts_of_the_specification(networks):
    totals = {key: count(network) for key, network in networks.items() if key[1] != "small"}
    assert totals == {
        ("nyuv2", "mtan"): 44_229_073,
        ("nyuv2", "segnet"): 25_055_185,
        ("cityscapes", "mtan"): 41_206_984,
        ("cityscapes", "segnet"): 25_017_672,
    }
    for experiment, tasks in (("nyuv2", 3), ("cityscapes", 2)):
        trunk = networks[experiment, "mtan"].trunk
        assert [count(a) + count(b) for a, b in zip(trunk.encoder_masks, trunk.decoder_masks, strict=True)] == tasks * [
            2_984_576
        ]
        assert count(trunk.encoder_steps) + count(trunk.decoder_steps) == 10_220_160
        assert count(trunk.shared) == 24_943_296
    assert count(networks["nyuv2", "segnet"].trunk.decoder[-1][-1]) == 37_056


@pytest.mark.parametrize(
    ("experiment", "module", "height", "width"), [("nyuv2", nyuv2, 96, 128), ("cityscapes", cityscapes, 64, 96)]
)
@pytest.mark.parametrize("name", NAMES)
def test_answers_have_the_size_of_the_image(networks, experiment, module, height, width, name):
    answers = networks[experiment, name](torch.empty(2, 3, height, width, device="meta"))
    channels = {"segmentation": {"nyuv2": 13, "cityscapes": 7}[experiment], "depth": 1, "normals": 3}
    assert {task: tuple(answer.shape) for task, answer in answers.items()} == {
        task: (2, channels[task], height, width) for task in module.TASKS
    }


def test_a_misspelt_network_is_refused():
    with pytest.raises(ValueError, match=r"model\.name must be one of small, segnet, mtan, but got mtn"):
        nyuv2.build_model(nyuv2.ModelConfig("mtn"))


@pytest.mark.parametrize("size", [(72, 96), (37, 45), (16, 16)])
def test_small_network_answers_and_learns_at_sizes_that_pooling_does_not_divide(size):
    torch.manual_seed(0)
    network = nyuv2.build_model(nyuv2.ModelConfig())
    answers = network(torch.rand(2, 3, *size))
    assert {tuple(answer.shape[-2:]) for answer in answers.values()} == {size}
    torch.testing.assert_close(answers["segmentation"].exp().sum(1), torch.ones(2, *size))
    torch.testing.assert_close(answers["normals"].square().sum(1), torch.ones(2, *size))
    sum(answer.square().mean() for answer in answers.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_an_image_too_small_to_be_pooled_is_refused():
    with pytest.raises(ValueError, match=r"at least 8 pixels for 3 poolings, but got \(1, 3, 7, 40\)"):
        SegNet(NARROW, SHALLOW)(torch.rand(1, 3, 7, 40))


def test_unpooling_puts_values_back_where_they_were():
    network = SegNet(NARROW, SHALLOW)
    maps = network.maps(torch.rand(2, 3, 22, 18))
    assert [tuple(m.shape[1:]) for m in maps.last] == [(4, 22, 18), (6, 11, 9), (8, 5, 4)]
    assert [tuple(m.shape[1:]) for m in maps.unpooled] == [(8, 5, 4), (6, 11, 9), (4, 22, 18)]
    assert [tuple(m.shape[1:]) for m in maps.decoded] == [(6, 5, 4), (4, 11, 9), (4, 22, 18)]
    deepest, put_back = maps.last[-1][:, :, :4, :4], maps.unpooled[0][:, :, :4, :4]
    nonzero = put_back != 0
    torch.testing.assert_close(put_back[nonzero], deepest[nonzero])
    torch.testing.assert_close(nn.functional.max_pool2d(put_back, 2), nn.functional.max_pool2d(deepest, 2))


def test_convolutions_begin_xavier_normal_without_bias():
    torch.manual_seed(0)
    network = SegNet()
    weight, bias = network.encoder[4][0][0].weight, network.encoder[4][0][0].bias
    assert weight.std().item() == pytest.approx((2 / (9 * 512 + 9 * 512)) ** 0.5, rel=0.01)
    assert not bias.any()


def test_what_each_loss_reaches_in_a_segnet():
    network = SegNet(NARROW, SHALLOW), build_heads(4, {"segmentation": 13, "depth": 1, "normals": 3})
    network[1](network[0](torch.rand(2, 3, 16, 16)))["depth"].mean().backward()
    assert all(parameter.grad is not None for parameter in network[0].parameters())
    assert {name.partition(".")[0] for name, parameter in network[1].named_parameters() if parameter.grad is not None} == {
        "depth"
    }


def test_what_each_loss_reaches_in_an_mtan():
    """All of the trunk counts as shared, but of the masks a task reaches its own only."""
    torch.manual_seed(0)
    trunk, heads = MTAN(3, NARROW, SHALLOW), build_heads(4, {"segmentation": 13, "depth": 1, "normals": 3})
    features = trunk(torch.rand(2, 3, 16, 24))
    assert [tuple(own.shape) for own in features] == 3 * [(2, 4, 16, 24)]
    heads(features)["depth"].mean().backward()
    reached = {name for name, parameter in trunk.named_parameters() if parameter.grad is not None}
    expected = {
        name
        for name, _ in trunk.named_parameters()
        if name.startswith(("shared", "encoder_steps", "decoder_steps", "encoder_masks.1", "decoder_masks.1"))
    }
    assert reached == expected
    assert {name.partition(".")[0] for name, parameter in heads.named_parameters() if parameter.grad is not None} == {"depth"}


def test_mtan_masks_select_from_the_maps():
    """With masks that are open everywhere the attended features are the shared decoder's; with closed ones, nothing."""
    torch.manual_seed(0)
    trunk = MTAN(2, NARROW, SHALLOW).eval()
    images = torch.rand(1, 3, 16, 16)
    for task, bias in enumerate((50.0, -50.0)):
        for mask in trunk.decoder_masks[task]:
            nn.init.constant_(mask[4].bias, bias)
            nn.init.zeros_(mask[4].weight)
    opened, closed = trunk(images)
    torch.testing.assert_close(opened, trunk.shared(images))
    torch.testing.assert_close(closed, torch.zeros_like(closed))


def mtan_step_by_step(trunk, images, task):
    """Return the features of a task as specified, one stage after the other, in a network of three stages."""
    pool, (e, d) = nn.MaxPool2d(2, return_indices=True), (trunk.shared.encoder, trunk.shared.decoder)
    first, last, places = [], [], []
    x = images
    for k in range(3):
        x = e[k][0](x)
        first.append(x)
        for layer in range(1, len(e[k])):
            x = e[k][layer](x)
        last.append(x)
        x, indices = pool(x)
        places.append(indices)
    down, up = trunk.encoder_masks[task], trunk.decoder_masks[task]
    a = nn.functional.max_pool2d(trunk.encoder_steps[0](down[0](first[0]) * last[0]), 2)
    a = nn.functional.max_pool2d(trunk.encoder_steps[1](down[1](torch.cat([first[1], a], 1)) * last[1]), 2)
    a = nn.functional.max_pool2d(trunk.encoder_steps[2](down[2](torch.cat([first[2], a], 1)) * last[2]), 2)
    for k in range(3):  # the first of these is the deepest stage
        unpooled = nn.MaxUnpool2d(2)(x, places[2 - k])
        x = d[k](unpooled)
        larger = nn.functional.interpolate(a, scale_factor=2, mode="bilinear", align_corners=True)
        a = up[k](torch.cat([unpooled, trunk.decoder_steps[k](larger)], 1)) * x
    return a


def test_mtan_is_wired_as_specified():
    torch.manual_seed(0)
    trunk = MTAN(2, NARROW, SHALLOW)
    images = torch.rand(2, 3, 16, 24)
    for task, features in enumerate(trunk(images)):
        assert features.std() > 0.1
        torch.testing.assert_close(features, mtan_step_by_step(trunk, images, task))


def test_mtan_attention_of_the_encoder_reaches_its_own_task_only():
    torch.manual_seed(0)
    trunk = MTAN(2, NARROW, SHALLOW)
    images = torch.rand(2, 3, 16, 16)
    before = [own.clone() for own in trunk(images)]
    nn.init.constant_(trunk.encoder_masks[0][0][4].bias, -50.0)
    after = trunk(images)
    assert not torch.allclose(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_a_vector_without_direction_is_zero_and_has_a_finite_gradient():
    vectors = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, -4.0]]).T.reshape(1, 3, 1, 2).requires_grad_()
    unit = UnitLength()(vectors)
    torch.testing.assert_close(unit[0, :, 0].T, torch.tensor([[0.0, 0.0, 0.0], [0.6, 0.0, -0.8]]))
    unit.sum().backward()
    assert not vectors.grad[0, :, 0, 0].any()
    torch.testing.assert_close(vectors.grad[0, :, 0, 1], (torch.ones(3) + torch.tensor([0.6, 0.0, -0.8]) * 0.2) / 5)


@pytest.mark.filterwarnings("ignore:shared must hold parameters that several tasks reach")
@pytest.mark.parametrize("source", ["parameters", "features"])
@pytest.mark.parametrize("trunk", [SegNet(NARROW, SHALLOW), MTAN(3, NARROW, SHALLOW)], ids=["segnet", "mtan"])
def test_a_balanced_step_with_the_representation_of_each_network(trunk, source):
    torch.manual_seed(0)
    network = Network(trunk, build_heads(NARROW[0], {"segmentation": 13, "depth": 1, "normals": 3}))
    images = torch.rand(2, 3, 16, 24)
    normals = nn.functional.normalize(torch.rand(2, 3, 16, 24), dim=1)
    batch = (images, torch.randint(13, (2, 16, 24)), torch.rand(2, 1, 16, 24), normals)
    features = network.trunk(images)
    losses = nyuv2.losses(network.heads(features), batch)
    balancer = balance.Balancer(tasks=nyuv2.TASKS, gradient="mgda", source=source)
    report = balancer.backward(losses, shared=network.trunk.parameters(), features=features)
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    assert report.gramian.shape == (3, 3)
    own_maps = source == "features" and isinstance(trunk, MTAN)  # no task reaches another's map, so nothing conflicts
    assert bool((report.gramian - report.gramian.diag().diag()).any()) != own_maps


@pytest.mark.filterwarnings("ignore:shared must hold parameters that several tasks reach")
def test_features_given_as_a_hint_change_no_gradient():
    """As the trainer passes them along; here they are a tuple."""
    gradients = []
    for hint in (False, True):
        torch.manual_seed(3)
        network = Network(MTAN(2, NARROW, SHALLOW), build_heads(NARROW[0], cityscapes.model.OUTPUTS))
        batch = (torch.rand(2, 3, 16, 16), torch.randint(7, (2, 16, 16)), torch.rand(2, 1, 16, 16))
        features = network.trunk(batch[0])
        losses = cityscapes.losses(network.heads(features), batch)
        balancer = balance.Balancer(tasks=cityscapes.TASKS, gradient="mgda")
        balancer.backward(losses, shared=network.trunk.parameters(), features=features if hint else None)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    torch.testing.assert_close(*gradients)
