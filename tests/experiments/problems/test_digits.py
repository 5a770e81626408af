import pytest
import torch
from sklearn.datasets import load_digits

from experiments.problems.digits import DataConfig, build_model, load, losses, metrics, targets
from experiments.problems.digits.data import parts


def clean(splits):
    return splits.train.pairs, splits.validation, splits.test


@pytest.fixture(scope="module")
def splits():
    return load(DataConfig())


def test_sizes(splits):
    assert [len(split) for split in splits] == [6000, 1000, 1000]


def test_source_images_are_split_before_they_are_paired():
    labels = torch.tensor(load_digits().target)
    train, validation, test = (set(part.tolist()) for part in parts(labels, 0))
    assert len(train) + len(validation) + len(test) == 1797
    assert train.isdisjoint(validation)
    assert len(train | validation | test) == 1797


def test_no_image_is_in_two_splits(splits):
    """On the pairs themselves: the clean left digits, of which the data set has no duplicates across the splits."""
    seen = [{tuple(row) for row in (16 * split.tensors[3]).int().tolist()} for split in clean(splits)]
    assert seen[0].isdisjoint(seen[1])
    assert seen[0].isdisjoint(seen[2])
    assert seen[1].isdisjoint(seen[2])


def test_canvas_is_the_maximum_of_two_real_digits(splits):
    canvas, left, right, clean = splits.train.pairs.tensors
    assert canvas.shape == (6000, 1, 12, 12)
    assert canvas.min() == 0
    assert canvas.max() == 1
    clean = clean.reshape(-1, 8, 8)
    assert (canvas[:, 0, :8, :8] >= clean).all()
    assert torch.equal(canvas[:, 0, :4, :8], clean[:, :4])
    assert torch.equal(canvas[:, 0, :8, :4], clean[:, :, :4])
    assert canvas[:, 0, :4, 8:].max() == 0
    source = load_digits()
    images = {tuple(image.astype(int).flatten()): label for image, label in zip(source.images, source.target, strict=True)}
    for k in range(50):
        assert images[tuple((16 * clean[k]).int().flatten().tolist())] == left[k]
    assert set(right.tolist()) == set(range(10))


def test_data_seed_fixes_the_pairs():
    a, b, c = (load(DataConfig(seed=seed, train_pairs=50)).train.pairs.tensors[0] for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_training_images_get_noise_of_the_given_size_anew_each_time(splits):
    indices = list(range(500))
    first, second = splits.train[indices][0], splits.train[indices][0]
    assert not torch.equal(first, second)
    assert (first - splits.train.pairs[indices][0]).std().item() == pytest.approx(DataConfig().noise, rel=0.02)
    assert torch.equal(
        load(DataConfig(noise=0.0, train_pairs=9)).train[[0, 3]][0], load(DataConfig(train_pairs=9)).train.pairs[[0, 3]][0]
    )
    with pytest.raises(ValueError, match=r"data\.noise must not be negative"):
        load(DataConfig(noise=-1.0))


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match=r"data\.train_pairs must be at least 1"):
        load(DataConfig(train_pairs=0))


def test_trunk_is_small():
    assert 20_000 <= sum(p.numel() for p in build_model().trunk.parameters()) <= 60_000


def test_losses_have_deliberately_different_scales(splits):
    torch.manual_seed(0)
    batch = splits.train[list(range(500))]
    values = {task: loss.item() for task, loss in losses(build_model()(batch[0]), batch).items()}
    assert values["sum"] > 10 * values["left"] > 50 * values["reconstruction"]


def test_metrics_of_perfect_and_of_known_answers(splits):
    batch = splits.test[list(range(100))]
    answers = targets(batch)
    perfect = {
        "left": torch.nn.functional.one_hot(answers["left"], 10).float(),
        "right": torch.nn.functional.one_hot(answers["right"], 10).float(),
        "sum": answers["sum"],
        "reconstruction": answers["reconstruction"],
    }
    assert {n: m(perfect[n.partition("/")[0]], answers[n.partition("/")[0]]).item() for n, m in metrics().items()} == {
        "left/accuracy": 1,
        "right/accuracy": 1,
        "sum/mae": 0,
        "reconstruction/rmse": 0,
    }
    assert metrics()["sum/mae"](answers["sum"] + 2, answers["sum"]).item() == pytest.approx(2)
    assert metrics()["reconstruction/rmse"](answers["reconstruction"] + 0.5, answers["reconstruction"]).item() == pytest.approx(
        0.5
    )
    assert torch.equal(answers["sum"].flatten(), (batch[1] + batch[2]).float())
