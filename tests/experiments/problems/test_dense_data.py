import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from experiments.datasets.rooms import arrays, storage, write
from experiments.problems.cityscapes import data as cityscapes
from experiments.problems.dense import splits
from experiments.problems.dense.augmentation import Augmented, Draw, augment, draw
from experiments.problems.nyuv2 import data as nyuv2
from tests.writers.dense import write_cityscapes, write_nyuv2

SIZE = {"height": 32, "width": 48}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The layout of NYUv2, with twelve training samples and no test folder."""
    folder = tmp_path_factory.mktemp("nyuv2")
    write(folder, {"train": 12, "val": 3}, **SIZE)
    return folder


@pytest.fixture
def official(made, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(made, tmp_path / "data")


def files(folder, **options):
    return nyuv2.DataConfig(source="files", path=str(folder), **options)


def everything(data):
    return data[list(range(len(data)))]


def of_split(split, count):
    """The scenes as the loader should give them."""
    image, label, depth, normal = (torch.from_numpy(part) for part in arrays(split, count, **SIZE).values())
    return image.permute(0, 3, 1, 2), label.long(), depth.permute(0, 3, 1, 2), normal.permute(0, 3, 1, 2)


def assert_same(a, b):
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_are_what_is_in_the_files(made):
    data = nyuv2.load(files(made, protocol="paper", augment=False))
    batch = data.train[[11, 0, 2, 10]]
    assert [(part.dtype, tuple(part.shape)) for part in batch] == [
        (torch.float32, (4, 3, 32, 48)),
        (torch.int64, (4, 32, 48)),
        (torch.float32, (4, 1, 32, 48)),
        (torch.float32, (4, 3, 32, 48)),
    ]
    assert_same(
        batch, tuple(part[[11, 0, 2, 10]] for part in of_split("train", 12))
    )  # 10.npy comes after 9.npy, not after 1.npy
    assert_same(everything(data.test), of_split("val", 3))


@pytest.mark.parametrize(("problem", "write_files"), [(nyuv2, write_nyuv2), (cityscapes, write_cityscapes)])
def test_files_are_read_as_an_independent_writer_writes_them(problem, write_files, tmp_path):
    written = write_files(tmp_path, {"train": 3, "val": 2})
    data = problem.load(problem.DataConfig(source="files", path=str(tmp_path), protocol="paper", augment=False))
    for split, arrays_by_folder in ((data.train, written["train"]), (data.test, written["val"])):
        for part, array in zip(everything(split), arrays_by_folder.values(), strict=True):
            assert np.array_equal(part.movedim(1, -1) if array.ndim == 4 else part, array)


def test_stored_types_and_the_order_of_axes_in_memory_may_differ(official):
    for part, kind in (("label", np.int64), ("image", np.float64), ("normal", np.float16)):
        file = official / "train" / part / "0.npy"
        np.save(file, np.asfortranarray(np.load(file).astype(kind)))
    batch = nyuv2.load(files(official, protocol="paper", augment=False)).train[[0]]
    expected = of_split("train", 1)
    assert_same(batch[:3], expected[:3])
    assert batch[3].dtype == torch.float32


def test_a_tenth_of_the_training_files_validates_and_val_tests(made):
    data = nyuv2.load(files(made, augment=False))
    assert [len(split) for split in data] == [11, 1, 3]
    assert sorted(data.train.numbers + data.validation.numbers) == list(range(12))
    assert data.validation.folder == made / "train"
    assert data.test.folder == made / "val"
    larger = nyuv2.load(files(made, num_validation=4, num_train=5, num_test=2, seed=3))
    assert [len(split) for split in larger] == [5, 4, 2]
    assert set(data.validation.numbers) < set(larger.validation.numbers)
    assert not set(larger.validation.numbers) & set(larger.train.data.numbers)


def test_the_protocol_of_the_papers_has_no_validation_samples(made):
    data = nyuv2.load(files(made, protocol="paper"))
    assert [len(split) for split in data] == [12, 3, 3]
    assert_same(everything(data.validation), everything(data.test))


def test_a_test_folder_makes_val_the_validation_set(tmp_path):
    write(tmp_path, {"train": 4, "val": 2, "test": 3}, **SIZE)
    data = nyuv2.load(files(tmp_path))
    assert [len(split) for split in data] == [4, 2, 3]
    assert_same(everything(data.validation), of_split("val", 2))
    assert_same(everything(data.test), of_split("test", 3))
    paper = nyuv2.load(files(tmp_path, protocol="paper"))
    assert_same(everything(paper.validation), everything(paper.test))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES = {
    "missing": ("train/depth/3.npy", lambda file: file.unlink(), "is missing"),
    "one too many": (
        "train/label/12.npy",
        lambda file: np.save(file, np.zeros((32, 48))),
        "image/12.npy is missing.*13 in label",
    ),
    "cut off": ("train/normal/7.npy", truncate, "must have 18560 bytes, but has 18460. Was it cut off"),
    "empty": ("val/image/2.npy", lambda file: file.write_bytes(b""), "is not in NumPy's format"),
    "not an array": ("train/label/0.npy", lambda file: file.write_text("labels"), "is not in NumPy's format"),
    "objects": ("train/depth/1.npy", lambda file: np.save(file, np.full((32, 48, 1), None)), "floating type, but has object"),
    "a folder instead": ("train/depth/2.npy", lambda file: (file.unlink(), file.mkdir()), "cannot be read: Is a directory"),
    "cut off in its header": ("train/depth/11.npy", lambda file: file.write_bytes(file.read_bytes()[:60]), "in NumPy's format"),
    "turned": ("train/image/5.npy", lambda file: np.save(file, np.zeros((48, 32, 3))), r"\(32, 48, 3\), but has \(48, 32, 3\)"),
    "no channel": ("val/depth/0.npy", lambda file: np.save(file, np.zeros((32, 48))), r"\(32, 48, 1\), but has \(32, 48\)"),
    "grey": ("train/image/0.npy", lambda file: np.save(file, np.zeros((32, 48))), r"\(H, W, 3\), but has \(32, 48\)"),
    "bytes": ("train/image/4.npy", lambda file: np.save(file, np.zeros((32, 48, 3), np.uint8)), "scaled to 0..1"),
    "a name": ("train/image/first.npy", lambda file: np.save(file, np.zeros(1)), "must be named after a number"),
    "a folder": ("train/normal", shutil.rmtree, "folder .*normal does not exist"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named(official, damage):
    name, spoil, message = DAMAGES[damage]
    spoil(official / name)
    with pytest.raises(ValueError, match=message) as error:
        nyuv2.load(files(official))
    expected = name.replace("label", "image") if damage == "one too many" else name
    assert str(official / expected) in str(error.value)


@pytest.mark.parametrize("value", [13, -2, 255, 0.5, -0.5, np.nan])
def test_labels_out_of_range_are_named(official, value):
    file = official / "val/label/1.npy"
    label = np.load(file)
    label[3, 4] = value
    np.save(file, label)
    with pytest.raises(ValueError, match=rf"val/label/1.npy: labels must be 0..12, or -1 = unknown, but got {float(value)}"):
        nyuv2.load(files(official))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "files"}, "must be the folder with train and val in it, but got None. Set data.path=FOLDER"),
        ({"path": "somewhere"}, "data.source must be files where data.path is given, but got scenes"),
        ({"source": "files", "path": "/nowhere"}, "folder /nowhere/train/image does not exist.*train and val"),
        ({"num_train": 0}, "data.num_train must be at least 1"),
        ({"seed": -1}, "data.seed must not be negative"),
        ({"num_train": 10_001}, "1 to 10000 scenes"),
        ({"source": "files", "path": "x", "height": 32}, "both data.height and data.width"),
    ],
)
def test_mistakes_in_the_configuration(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        nyuv2.load(nyuv2.DataConfig(cache=str(tmp_path), **options))


def test_more_files_than_there_are(made):
    with pytest.raises(ValueError, match=r"data\.num_train must be at most 11, the number of files, but got 12"):
        nyuv2.load(files(made, num_train=12))
    with pytest.raises(ValueError, match="must leave some of the 12 training files"):
        nyuv2.load(files(made, num_validation=12))
    with pytest.raises(ValueError, match=r"must have shape \(64, 96, 3\), but has \(32, 48, 3\)"):
        nyuv2.load(files(made, height=64, width=96))


def test_scenes_are_rendered_once_and_read_by_the_same_loader(tmp_path, monkeypatch):
    monkeypatch.setattr(splits.tempfile, "tempdir", str(tmp_path))
    config = OmegaConf.structured(nyuv2.DataConfig(num_train=5, num_validation=2, num_test=3, augment=False, **SIZE))
    data = nyuv2.load(config)
    assert [len(split) for split in data] == [5, 2, 3]
    assert_same(everything(data.train), of_split("train", 5))
    assert_same(everything(data.validation), of_split("val", 2))
    assert_same(everything(data.test), of_split("test", 3))
    assert tmp_path in data.train.folder.parents
    monkeypatch.setattr(storage, "render", None)
    again = nyuv2.load(OmegaConf.merge(config, {"num_train": 4}))
    assert len(again.train) == 4
    assert_same(everything(again.test), everything(data.test))


def test_a_damaged_or_foreign_cache_is_told(tmp_path):
    config = nyuv2.DataConfig(num_train=2, num_validation=1, num_test=1, cache=str(tmp_path), **SIZE)
    file = nyuv2.load(config).train.data.folder / "image/1.npy"
    truncate(file)
    with pytest.raises(ValueError, match="Was it cut off") as error:
        nyuv2.load(config)
    assert str(file) in str(error.value)
    (tmp_path / "file").touch()
    config.cache = str(tmp_path / "file")
    with pytest.raises(OSError, match=r"data\.cache: cannot write to .*file.*data\.cache=FOLDER"):
        nyuv2.load(config)


def test_cityscapes(tmp_path):
    config = cityscapes.DataConfig(num_train=3, num_validation=1, num_test=2, cache=str(tmp_path), augment=False, **SIZE)
    data = cityscapes.load(config)
    image, label, depth = data.test[[1, 0]]
    expected = arrays("test", 2, layout="cityscapes", **SIZE)
    assert (image.shape, label.shape, depth.shape) == ((2, 3, 32, 48), (2, 32, 48), (2, 1, 32, 48))
    assert np.array_equal(label.numpy(), expected["label_7"][::-1])
    assert np.array_equal(depth[:, 0].numpy(), expected["depth"][::-1, ..., 0])
    folder = data.test.folder.parent
    assert sorted(part.name for part in (folder / "train").iterdir()) == ["depth", "image", "label_7"]
    shutil.rmtree(folder / "test")
    official = cityscapes.load(cityscapes.DataConfig(source="files", path=str(folder)))
    assert [len(split) for split in official] == [2, 1, 1]


def sample(height=12, width=18):
    generator = torch.Generator().manual_seed(0)
    image, normal = (torch.rand(3, height, width, generator=generator) for _ in range(2))
    label = torch.randint(-1, 13, (height, width), generator=generator)
    return image, label, torch.rand(1, height, width, generator=generator), normal - 0.5


def bilinear(part, height, width):
    """Corner to corner, pixel by pixel."""
    _, h, w = part.shape
    result = np.empty((3, height, width))
    for i in range(height):
        for j in range(width):
            y, x = i * (h - 1) / (height - 1), j * (w - 1) / (width - 1)
            top, left = min(int(y), h - 2), min(int(x), w - 2)
            b, a = y - top, x - left
            corner = part[:, top : top + 2, left : left + 2]
            result[:, i, j] = (1 - b) * ((1 - a) * corner[:, 0, 0] + a * corner[:, 0, 1])
            result[:, i, j] += b * ((1 - a) * corner[:, 1, 0] + a * corner[:, 1, 1])
    return result


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("multiply", "factor"), [(False, 1 / 1.5), (True, 1.5)])
def test_augmentation_by_hand(mirrored, multiply, factor):
    image, label, depth, normal = sample()
    window = (..., slice(3, 11), slice(5, 17))  # 12 / 1.5 = 8 rows and 18 / 1.5 = 12 columns
    nearest = np.ix_(np.arange(12) * 8 // 12, np.arange(18) * 12 // 18)
    smooth = [torch.from_numpy(bilinear(part[window].numpy(), 12, 18)).float() for part in (image, normal)]
    expected = [smooth[0], label[window][nearest], depth[0][window][nearest][None] * factor, smooth[1]]
    if mirrored:
        expected = [part.flip(-1) for part in expected]
        expected[3][0] *= -1
    got = augment((image, label, depth, normal), Draw(1.5, 3, 5, mirrored), multiply=multiply)
    assert torch.equal(got[1], expected[1])
    for k in (0, 2, 3):
        torch.testing.assert_close(got[k], expected[k])


def test_augmentation_at_scale_one():
    whole = sample()
    assert_same(augment(whole, Draw(1.0, 0, 0, mirrored=False)), whole)
    twice = augment(augment(whole, Draw(1.0, 0, 0, mirrored=True)), Draw(1.0, 0, 0, mirrored=True))
    assert_same(twice, whole)
    assert len(augment(whole[:3], Draw(1.2, 1, 2, mirrored=True))) == 3


def test_draws_are_uniform_and_reach_every_corner():
    draws = [draw(np.random.default_rng([0, 0, index]), 12, 18) for index in range(3000)]
    for scale, corners in ((1.0, {(0, 0)}), (1.2, 3 * 4), (1.5, 5 * 7)):
        of_scale = [choice for choice in draws if choice.scale == scale]
        assert len(of_scale) == pytest.approx(1000, abs=100)
        places = {(choice.top, choice.left) for choice in of_scale}
        assert places == corners if scale == 1 else len(places) == corners
        assert all(0 <= top <= 12 - int(12 / scale) and 0 <= left <= 18 - int(18 / scale) for top, left in places)
    assert sum(choice.mirrored for choice in draws) == pytest.approx(1500, abs=100)


def test_mirrored_normals_are_those_of_the_mirrored_depth():
    """A wall that recedes to the right, mirrored, recedes to the left: its normal turns over."""
    slope = torch.linspace(1, 2, 18).expand(1, 12, 18)
    normal = torch.tensor([-0.6, 0.0, 0.8])[:, None, None].expand(3, 12, 18)
    _, _, depth, turned = augment(
        (torch.zeros(3, 12, 18), torch.zeros(12, 18).long(), slope, normal), Draw(1.0, 0, 0, mirrored=True)
    )
    assert (depth[0, :, 0] > depth[0, :, -1]).all()
    assert turned[:, 0, 0].tolist() == pytest.approx([0.6, 0, 0.8])


def test_draws_depend_on_seed_epoch_and_index_alone(made):
    data = nyuv2.load(files(made, seed=1)).train
    first = everything(data)
    assert_same(everything(data), first)
    assert_same(data[[4, 2]], tuple(part[[4, 2]] for part in first))
    data.set_epoch(1)
    second = everything(data)
    assert not torch.equal(first[0], second[0])
    data.set_epoch(0)
    assert_same(everything(data), first)
    assert not torch.equal(everything(nyuv2.load(files(made, seed=2)).train)[0], first[0])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_number_of_workers_changes_nothing(made):
    data = nyuv2.load(files(made)).train
    batches = BatchSampler(SequentialSampler(data), 3, drop_last=False)
    for epoch in (1, 2):
        data.set_epoch(epoch)
        alone, helped = (list(DataLoader(data, sampler=batches, batch_size=None, num_workers=n)) for n in (0, 2))
        for a, b in zip(alone, helped, strict=True):
            assert_same(a, b)


def test_only_training_samples_are_augmented_and_inverse_depth_grows(tmp_path):
    options = {"num_train": 8, "num_validation": 1, "num_test": 1, "cache": str(tmp_path), **SIZE}
    for module, protocol, multiply in (
        (nyuv2, "sound", False),
        (nyuv2, "paper", False),
        (cityscapes, "sound", True),
        (cityscapes, "paper", False),
    ):
        data = module.load(module.DataConfig(protocol=protocol, **options))
        plain = module.load(module.DataConfig(protocol=protocol, augment=False, **options))
        assert isinstance(data.train, Augmented)
        assert_same(everything(data.test), everything(plain.test))
        assert_same(everything(data.validation), everything(plain.validation))
        before, after = everything(plain.train)[2], everything(data.train)[2]
        for row in range(8):
            scale = draw(np.random.default_rng([0, 0, row]), 32, 48).scale
            values = before[row] * scale if multiply else before[row] / scale
            assert torch.isin(after[row], values).all()
