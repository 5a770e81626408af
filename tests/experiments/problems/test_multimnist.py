import struct

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from balance import Balancer
from experiments.problems.multimnist import TASKS, DataConfig, ModelConfig, build_model, idx, load, losses, metrics, targets
from experiments.problems.multimnist.data import mnist_canvases, overlay, smoothed
from experiments.problems.multimnist.model import SPLITTERS, build_splitter
from tests.writers.mnist import write_mnist


@pytest.fixture
def mnist(tmp_path):
    write_mnist(tmp_path / "mnist")
    return tmp_path / "mnist"


@pytest.fixture(scope="module")
def splits():
    return load(DataConfig())


@pytest.fixture(scope="module")
def batch(splits):
    return splits.train[list(range(64))]


# --- files of MNIST --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "ending"), [("", ""), ("raw", ".gz"), ("MNIST/raw", "")])
def test_files_are_read_as_they_were_written(tmp_path, place, ending):
    write_mnist(tmp_path / place, ending=ending)
    images, labels = idx.read(tmp_path, "test")
    generator = np.random.default_rng(0)
    generator.integers(0, 256, (60, 28, 28))
    generator.integers(0, 10, 60)
    assert images.dtype == torch.uint8
    assert np.array_equal(images, generator.integers(0, 256, (20, 28, 28)))
    assert np.array_equal(labels, generator.integers(0, 10, 20))
    assert len(idx.read(tmp_path, "train").labels) == 60


def test_the_other_spelling_of_the_names(mnist):
    (mnist / "t10k-labels-idx1-ubyte").rename(mnist / "t10k-labels.idx1-ubyte")
    assert len(idx.read(mnist, "test").labels) == 20


def test_a_missing_file_is_named(mnist):
    (mnist / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-labels-idx1-ubyte or .*\.gz must be in .*mnist .* leave the path out"):
        load(DataConfig("mnist", str(mnist)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], r"is truncated: it must have 68 bytes for sizes \[60\], but has 67"),
        (lambda content: content[:6], "is truncated: it has 6 bytes, which are no header"),
        (lambda content: content + b"\0", "is too long"),
        (lambda content: struct.pack(">i", 2051) + content[4:], "must begin with the magic number 2049, but begins with 2051"),
        (lambda content: content[:8] + b"\x0b" + content[9:], "must have labels 0..9, but has the label 11"),
        (lambda content: struct.pack(">ii", 2049, 59) + content[9:], "has 60 images, but .* has 59 labels"),
        (lambda _: struct.pack(">ii", 2049, 0), "has 60 images, but .* has 0 labels"),
    ],
)
def test_a_wrong_file_is_named(mnist, change, message):
    file = mnist / "train-labels-idx1-ubyte"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"train-labels-idx1-ubyte.*{message}|{message}"):
        idx.read(mnist, "train")


@pytest.mark.parametrize(
    "change", [lambda content: content[:-9], lambda content: b"no" + content[2:], lambda c: c[:30] + b"\xff" * 40]
)
def test_a_damaged_gzip_file_is_named(tmp_path, change):
    write_mnist(tmp_path, ending=".gz")
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz must be a gzip file, but cannot be read"):
        idx.read(tmp_path, "test")


def test_images_of_another_size_are_refused(tmp_path):
    write_mnist(tmp_path, size=27)
    with pytest.raises(ValueError, match=r"images of 28 x 28 pixels, but has \(27, 27\)"):
        idx.read(tmp_path, "train")


def test_pairs_of_mnist(mnist):
    """As Pillow makes the canvas smaller, which the published code uses."""
    digits = idx.read(mnist, "train")
    canvas, left, right = mnist_canvases(digits, "paper", torch.Generator().manual_seed(3))
    partners = torch.randint(60, (60,), generator=torch.Generator().manual_seed(3))
    assert torch.equal(left, digits.labels)
    assert torch.equal(right, digits.labels[partners])
    for k in (0, 31):
        large = np.zeros((36, 36), dtype=np.float32)
        large[:28, :28] = digits.images[k].numpy()
        large[6:34, 6:34] = np.maximum(large[6:34, 6:34], digits.images[partners[k]].numpy())
        small = np.asarray(Image.fromarray(large).resize((28, 28), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(canvas[k, 0] * 0.3081 + 0.1307, small, atol=1e-2)
    sound, *_ = mnist_canvases(digits, "sound", torch.Generator().manual_seed(3))
    torch.testing.assert_close(sound * 0.3081 + 0.1307, (canvas * 0.3081 + 0.1307) / 255, rtol=0, atol=1e-4)


def test_protocols_of_mnist(mnist):
    sound, paper = (load(DataConfig("mnist", str(mnist), protocol=protocol)) for protocol in ("sound", "paper"))
    assert [len(split) for split in sound] == [50, 10, 20]
    assert [len(split) for split in paper] == [60, 20, 20]
    for a, b in zip(paper.validation[list(range(20))], paper.test[list(range(20))], strict=True):
        assert torch.equal(a, b)
    rows = [{tuple(image) for image in split.tensors[0][:, 0, :5].flatten(1).tolist()} for split in sound]  # left digits alone
    assert [len(row) for row in rows] == [50, 10, 20]
    assert rows[0].isdisjoint(rows[1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"protocol": "papers"}, "data.protocol must be one of sound, paper, but got papers"),
        ({"protocol": "paper"}, "protocol must be sound for scikit-learn's digits"),
        ({"imbalance": 0.0}, "data.imbalance must be positive"),
        ({"label_smoothing": 1.0}, "data.label_smoothing must be at least 0 and below 1"),
    ],
)
def test_bad_data(config, message):
    with pytest.raises(ValueError, match=message):
        load(DataConfig(**config))


# --- digits ----------------------------------------------------------------------------------------------------------


def test_overlay():
    left, right = torch.tensor([[[1.0, 5.0], [2.0, 3.0]]]), torch.tensor([[[4.0, 6.0], [7.0, 8.0]]])
    assert overlay(left, right, (4, 4), (1, 1))[0, 0].tolist() == [[1, 5, 0, 0], [2, 4, 6, 0], [0, 7, 8, 0], [0, 0, 0, 0]]


def test_pairs_of_digits(splits):
    assert [len(split) for split in splits] == [10770, 1440, 1440]
    canvas, left, right, _ = splits.train.tensors
    assert canvas.shape == (10770, 1, 10, 12)
    source = load_digits()
    corners = [{tuple(image) for image in split.tensors[0][:, 0, :8, :4].flatten(1).tolist()} for split in splits]
    assert [len(corner) for corner in corners] == pytest.approx([1077, 360, 360], rel=0.1)  # some left halves are alike
    labels = {}
    for image, label in zip(source.images, source.target, strict=True):
        labels.setdefault((*image[:2].flatten(), *image[2:, :4].flatten()), set()).add(label)
    seen = canvas[:, 0] * 16
    for k in range(0, 10770, 500):  # where the right digit does not reach
        assert left[k].argmax().item() in labels[(*seen[k, :2, :8].flatten().tolist(), *seen[k, 2:8, :4].flatten().tolist())]
    assert sorted(right.argmax(dim=1).bincount()) == sorted(left.argmax(dim=1).bincount())  # partners are permutations


def test_source_digits_are_disjoint(splits):
    """On the left halves of left digits that occur once among all sources."""
    halves = [tuple(image[:, :4].flatten()) for image in load_digits().images]
    unique = {half for half in halves if halves.count(half) == 1}
    seen = [{tuple(image) for image in (split.tensors[0][:, 0, :8, :4] * 16).flatten(1).tolist()} & unique for split in splits]
    assert min(map(len, seen)) > 200
    assert seen[0].isdisjoint(seen[1])
    assert seen[0].isdisjoint(seen[2])
    assert seen[1].isdisjoint(seen[2])


def test_data_seed_fixes_the_pairs(splits):
    assert torch.equal(load(DataConfig()).train.tensors[0], splits.train.tensors[0])
    assert not torch.equal(load(DataConfig(seed=1)).train.tensors[0], splits.train.tensors[0])


def test_losses_have_smoothed_labels_and_the_imbalance(batch):
    labels = targets(batch)
    outputs = {task: torch.randn(64, 10) for task in ("left", "right")}
    expected = {task: cross_entropy(outputs[task], labels[task], label_smoothing=0.1) for task in outputs}
    torch.testing.assert_close(losses(outputs, batch), expected)
    scaled = losses(outputs, (*batch[:3], torch.full((64,), 1000.0)))
    torch.testing.assert_close(scaled, {"left": expected["left"], "right": 1000 * expected["right"]})
    assert load(DataConfig(imbalance=1000.0)).test[[0]][3].item() == 1000
    assert torch.equal(smoothed(torch.tensor([3]), 0.0), torch.eye(10)[[3]])


def test_metrics(batch):
    labels = targets(batch)
    answers = {"left": batch[1], "right": batch[2].roll(1, dims=1)}
    accuracies = {
        name: metric(answers[name.partition("/")[0]], labels[name.partition("/")[0]]).item()
        for name, metric in metrics().items()
    }
    assert accuracies == {"left/accuracy": 1, "right/accuracy": 0}


# --- networks --------------------------------------------------------------------------------------------------------


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_sizes_of_the_networks():
    assert count(build_model()) == 33_916
    assert count(build_model(ModelConfig(width=32))) == 152_308
    demo = build_model(ModelConfig(name="demo"))
    assert count(demo.trunk) == 121_120
    assert count(demo.heads) == 2 * 34_314
    outputs = demo(torch.randn(3, 1, 28, 28))
    torch.testing.assert_close(outputs["left"].exp().sum(dim=1), torch.ones(3))


def test_what_is_shared(batch):
    torch.manual_seed(0)
    trunk = build_model(ModelConfig())
    torch.manual_seed(0)
    everything = build_model(ModelConfig(shared="everything"))
    assert count(everything.trunk) == 33_916
    assert list(everything.heads.parameters()) == []
    torch.testing.assert_close(everything(batch[0]), trunk(batch[0]))


@pytest.mark.parametrize("name", [*SPLITTERS, "mgda"])
def test_splitters_change_the_trunk_alone(batch, name):
    torch.manual_seed(0)
    plain = build_model()
    split = build_model(ModelConfig(splitter=name))
    split.load_state_dict(plain.state_dict(), strict=False)
    data = (*batch[:3], torch.full((64,), 1000.0))
    for model in (plain, split):
        sum(losses(model(data[0]), data).values()).backward()
    of_plain, of_split = ({name: p.grad for name, p in model.named_parameters()} for model in (plain, split))
    for key, gradient in of_plain.items():
        if key.startswith("heads"):
            torch.testing.assert_close(of_split[key], gradient)
    assert not torch.allclose(of_split["trunk.1.weight"], of_plain["trunk.1.weight"], rtol=1e-2)
    assert split.heads.splitter is not None


@pytest.mark.parametrize("name", [name for name in SPLITTERS if name.startswith("normalized")])
def test_normalising_splitters_do_not_see_the_imbalance(batch, name):
    gradients = []
    for imbalance in (1.0, 1000.0):
        torch.manual_seed(0)
        model = build_model(ModelConfig(splitter=name))
        sum(losses(model(batch[0]), (*batch[:3], torch.full((64,), imbalance))).values()).backward()
        gradients.append([p.grad for p in model.trunk.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_seed_of_the_splitter():
    assert not torch.equal(build_splitter("project1", 0).random.normal(3), build_splitter("project1", 1).random.normal(3))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "smal"}, "model.name must be one of small, demo, but got smal"),
        ({"shared": "all"}, "model.shared must be one of trunk, everything, but got all"),
        ({"width": 0}, "model.width must be at least 1"),
        ({"splitter": "normalised"}, "Unknown model.splitter 'normalised'. Did you mean 'normalized'"),
    ],
)
def test_bad_models(config, message):
    with pytest.raises(ValueError, match=message):
        build_model(ModelConfig(**config))


def test_a_canvas_of_the_other_data_is_refused(batch):
    with pytest.raises(ValueError, match=r"must have shape \(1, 28, 28\), but got \(1, 10, 12\). Use model.name=small"):
        build_model(ModelConfig(name="demo"))(batch[0])


@pytest.mark.filterwarnings("ignore:shared must hold parameters that several tasks reach")
def test_whole_network_pcgrad_is_not_that_of_the_trunk(batch):
    """The heads' gradients count in the lengths."""
    gramians = []
    for shared in ("trunk", "everything"):
        torch.manual_seed(0)
        model = build_model(ModelConfig(shared=shared))
        task_losses = losses(model(batch[0]), batch)
        report = Balancer(TASKS, gradient="pcgrad").backward(task_losses, shared=model.trunk.parameters())
        gramians.append(report.gramian)
    assert gramians[0][0, 1].item() == pytest.approx(gramians[1][0, 1].item(), rel=1e-4)
    assert (gramians[1].diagonal() > 1.01 * gramians[0].diagonal()).all()
