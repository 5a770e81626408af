import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from experiments.datasets.faces import drawing, storage
from experiments.datasets.layouts.celeba import ATTRIBUTES
from experiments.problems.celeba import DataConfig, load


def everything(split):
    return split[list(range(len(split)))]


def test_drawn_faces_are_files_like_celebas(tmp_path, monkeypatch):
    config = DataConfig(cache=str(tmp_path), train_images=40, validation_images=5, test_images=6, seed=3)
    splits = load(config)
    assert [len(split) for split in splits] == [40, 5, 6]
    (root,) = tmp_path.glob("synthetic-3-40-5-6-*[!k]")
    files = sorted((root / "Img" / "img_align_celeba").iterdir())
    assert len(files) == 51
    with Image.open(files[-1]) as last:
        assert (last.format, last.size) == ("JPEG", (178, 218))
    again = load(DataConfig(source="celeba", path=str(root), cache=str(tmp_path)))
    assert torch.equal(everything(again.test)[0], everything(splits.test)[0])
    monkeypatch.setattr(drawing, "draw", None)
    assert torch.equal(everything(load(config).train)[1], everything(splits.train)[1])  # not drawn again


def test_drawn_faces_follow_their_seed(tmp_path):
    a, b, c = (
        everything(
            load(DataConfig(cache=str(tmp_path / str(i)), seed=seed, train_images=35, validation_images=1, test_images=1)).train
        )
        for i, seed in enumerate((0, 0, 1))
    )
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], c[0])


def test_drawn_faces_that_were_lost_are_drawn_again(tmp_path):
    config = DataConfig(cache=str(tmp_path), train_images=3, validation_images=1, test_images=1)
    expected = everything(load(config).train)[0]
    next(tmp_path.glob("synthetic*/Img/img_align_celeba/000002.jpg")).unlink()
    assert torch.equal(everything(load(config).train)[0], expected)


def test_rates_are_those_of_celeba():
    drawn = storage.attributes(20_000, np.random.default_rng(0))
    assert np.abs(drawn.mean(0) - np.array(storage.PERCENT) / 100).max() < 0.012
    for group in storage.EXCLUSIVE:
        assert drawn[:, [ATTRIBUTES.index(name) for name in group]].sum(1).max() == 1


@pytest.fixture(scope="module")
def contexts():
    """Attributes of 24 faces, and how they look."""
    labels = storage.attributes(24, np.random.default_rng(5))
    labels[:, ATTRIBUTES.index("Blurry")] = False
    labels[0] = labels[1:5].any(0)
    return labels, seen(labels)


def seen(labels, seed=7):
    """Faces as the network sees them, with the same place, skin, background, ... for every call. Shape (N, 64, 64, 3)."""
    drawn = drawing.draw(labels, np.random.default_rng(seed))
    return np.stack([np.asarray(Image.fromarray(face).resize((64, 64), Image.Resampling.BILINEAR)) for face in drawn]) / 255


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_every_attribute_changes_a_region_of_every_face(contexts, attribute):
    labels, before = contexts
    flipped = labels.copy()
    flipped[:, ATTRIBUTES.index(attribute)] ^= True
    change = np.abs(seen(flipped) - before).max(-1)
    pixels = (change > 0.05).sum((1, 2))
    assert pixels.min() >= 10
    assert pixels.max() < 0.5 * 64**2
    assert (change == 0).mean((1, 2)).min() > (0.2 if attribute == "Blurry" else 0.6)


@pytest.mark.slow
def test_most_attributes_can_be_learnt():
    """By a linear function of the pixels, fitted to 500 faces: area under the curve on 250 others, 0.5 for guesses.

    It cannot find brown hair, whose colour lies between the others.
    """
    labels = storage.attributes(750, np.random.default_rng(0))
    pixels = torch.from_numpy(seen(labels)).float().flatten(1)
    X, U = pixels[:500] - pixels[:500].mean(0), pixels[500:] - pixels[:500].mean(0)
    y = torch.from_numpy(labels[:500]).float()
    G = X @ X.T
    scores = (U @ X.T) @ torch.linalg.solve(G + 0.003 * G.diagonal().mean() * torch.eye(500), y - y.mean(0))
    areas = np.array([roc_auc_score(truth, score) for truth, score in zip(labels[500:].T, scores.T, strict=True)])
    assert (areas > 0.75).sum() >= 36
