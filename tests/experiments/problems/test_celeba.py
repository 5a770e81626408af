import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torchmetrics.classification import BinaryF1Score

from balance import Balancer
from experiments.datasets import image_cache
from experiments.problems import celeba
from experiments.problems.celeba import HIGHER_IS_BETTER, TASKS, DataConfig, ModelConfig, build_model, load
from tests.writers.celeba import COUNT, PARTITION, write_celeba


@pytest.fixture
def root(tmp_path):
    write_celeba(tmp_path / "celeba")
    return tmp_path / "celeba"


@pytest.fixture
def config(root, tmp_path):
    return DataConfig(source="celeba", path=str(root), cache=str(tmp_path / "cache"))


def image(root, number):
    return root / "Img" / "img_align_celeba" / f"{number:06d}.jpg"


def everything(split):
    return split[list(range(len(split)))]


def test_splits_hold_the_images_and_labels_of_the_files(tmp_path):
    root = tmp_path / "celeba"
    labels = write_celeba(root)
    splits = load(DataConfig(source="celeba", path=str(root), cache=str(tmp_path)))
    for part, split in enumerate(splits):
        rows = [i for i in range(COUNT) if PARTITION[i] == part]
        assert len(split) == len(rows)
        order = [len(rows) - 1, 0, 2]
        images, targets = split[order]
        assert images.shape == (3, 3, 64, 64)
        assert images.dtype == targets.dtype == torch.float32
        for picked, pixels, target in zip(order, images, targets, strict=True):
            with Image.open(image(root, rows[picked] + 1)) as original:
                small = np.asarray(original.resize((64, 64), Image.Resampling.BILINEAR))
            assert np.allclose(pixels.permute(1, 2, 0).numpy(), small / 255, atol=1e-6)
            assert target.tolist() == labels[rows[picked]].tolist()


def test_folders_of_the_layout_may_be_left_out(root, config):
    expected = [everything(split) for split in load(config)]
    for file in ("Anno/list_attr_celeba.txt", "Eval/list_eval_partition.txt", "Img/img_align_celeba"):
        shutil.move(root / file, root / Path(file).name)
    for split, (images, labels) in zip(load(config), expected, strict=True):
        assert torch.equal(everything(split)[0], images)
        assert torch.equal(everything(split)[1], labels)


@pytest.mark.parametrize("change", [lambda text: text[:-1], lambda text: text.replace("\n", "\r\n")])
def test_line_ends_lose_no_image(root, config, change):
    for file in (root / "Anno" / "list_attr_celeba.txt", root / "Eval" / "list_eval_partition.txt"):
        file.write_bytes(change(file.read_text()).encode())
    assert sum(len(split) for split in load(config)) == COUNT


def test_gray_images_get_three_channels(root, config):
    with Image.open(image(root, 1)) as original:
        gray = original.convert("L")
    gray.save(image(root, 1))
    pixels = load(config).train[[0]][0][0]
    assert torch.equal(pixels[0], pixels[2])


def edit(root, file, old, new):
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new, 1))


ANNO, EVAL = "Anno/list_attr_celeba.txt", "Eval/list_eval_partition.txt"
DAMAGE = {
    "no list of attributes": (lambda root: (root / ANNO).unlink(), r"Anno/list_attr_celeba\.txt, but .* has none"),
    "no partition": (lambda root: (root / EVAL).unlink(), r"Eval/list_eval_partition\.txt, but .* has none"),
    "no images": (lambda root: shutil.rmtree(root / "Img"), r"Img/img_align_celeba, but .* has none"),
    "no image": (lambda root: image(root, 7).unlink(), r"000007\.jpg is missing"),
    "several images": (lambda root: [image(root, i).unlink() for i in range(1, 9)], r"000005\.jpg, and 3 more are missing"),
    "cut image": (lambda root: os.truncate(image(root, 9), 900), r"damaged: .*000009\.jpg: image file is truncated"),
    "empty image": (lambda root: image(root, 9).write_bytes(b""), r"damaged: .*000009\.jpg"),
    "text for an image": (lambda root: image(root, 3).write_text("oid sha256"), r"damaged: .*000003\.jpg: cannot identify"),
    "other size": (
        lambda root: Image.new("RGB", (178, 178)).save(image(root, 5)),
        r"000005\.jpg: must have 178 x 218 pixels, but has 178 x 178",
    ),
    "cut list": (
        lambda root: (root / ANNO).write_text("\n".join((root / ANNO).read_text().splitlines()[:-3])),
        r"list_attr_celeba\.txt must list '36' images, .* lists 33",
    ),
    "cut line": (
        lambda root: os.truncate(root / ANNO, (root / ANNO).stat().st_size - 5),
        r"list_attr_celeba\.txt: '000036\.jpg' must be followed by 40 times 1 or -1",
    ),
    "other label": (lambda root: edit(root, ANNO, " 1 ", " 2 "), r"must be followed by 40 times 1 or -1, but got .*2"),
    "other attributes": (lambda root: edit(root, ANNO, "Bald", "Bold"), r"line 2, must name .* but has 'Bold'"),
    "empty list": (lambda root: (root / ANNO).write_text(""), r"line 2, must name .* but has '0 words'"),
    "no text": (lambda root: (root / EVAL).write_bytes(b"\xff\xd8\xff"), r"list_eval_partition\.txt must be text"),
    "cut partition": (
        lambda root: (root / EVAL).write_text("000001.jpg 0\n"),
        r"list_eval_partition\.txt must list the 36 images .* lists 1\.",
    ),
    "other order": (
        lambda root: edit(root, EVAL, "000004.jpg", "000099.jpg"),
        r"in the place of '000004\.jpg' it has '000099\.jpg 0'",
    ),
    "other part": (lambda root: edit(root, EVAL, "000004.jpg 0", "000004.jpg 3"), r"each with 0, 1 or 2, .*'000004\.jpg 3'"),
    "no validation": (
        lambda root: (root / EVAL).write_text((root / EVAL).read_text().replace("jpg 1", "jpg 0")),
        r"must have images for validation \(number 1\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named(root, config, damage):
    change, message = DAMAGE[damage]
    change(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(config)
    assert not list(Path(config.cache).glob("*.u8"))
    assert not list(Path(config.cache).glob("*.partial"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "celeba"}, r"Anno, Eval and Img in it, but got None\. Set data\.path="),
        ({"source": "faces"}, r"data\.source must be one of synthetic, celeba, but got faces"),
        ({"path": "somewhere"}, r"data\.source must be celeba where data\.path is given"),
        ({"workers": 0}, r"data\.workers must be at least 1"),
        ({"test_images": 0}, r"data\.test_images must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load(DataConfig(cache=str(tmp_path), **options))


def test_a_cache_that_cannot_be_written_is_named(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file.*data\.cache="):
        load(DataConfig(source="celeba", path=str(root), cache=str(tmp_path / "file" / "cache")))


def test_the_cache_lies_with_the_users_caches_by_default(root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of_user"))
    load(DataConfig(source="celeba", path=str(root)))
    assert len(list((tmp_path / "of_user" / "balance" / "celeba").glob("*.u8"))) == 1


def test_images_are_decoded_once(config, monkeypatch):
    first = [everything(split)[0] for split in load(config)]
    monkeypatch.setattr(image_cache, "decode", None)
    for split, images in zip(load(config), first, strict=True):
        assert torch.equal(everything(split)[0], images)


def test_a_pickled_data_set_has_no_images_in_it(config):
    split = load(config).train
    pickled = pickle.dumps(split)
    assert len(pickled) < 5000
    assert torch.equal(everything(pickle.loads(pickled))[0], everything(split)[0])


def test_config_fits_the_schema():
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.from_dotlist(["source=celeba", "path=here"]))
    assert (merged.source, merged.path, merged.cache) == ("celeba", "here", None)
    assert OmegaConf.structured(ModelConfig).name == "small"


def test_the_official_network_has_the_papers_parameters():
    model = build_model(ModelConfig("official"))
    assert sum(p.numel() for p in model.trunk.parameters()) == 5_176_640
    assert sum(p.numel() for p in model.heads.parameters()) == 20_520
    assert sum(p.numel() for p in model.parameters()) == 5_197_160
    kinds = [type(layer).__name__ for layer in model.trunk]
    assert (kinds.count("Conv2d"), kinds.count("MaxPool2d"), kinds.count("Linear")) == (7, 3, 2)
    assert model.trunk(torch.rand(2, 3, 64, 64)).shape == (2, 512)
    assert model.trunk[:-7](torch.rand(2, 3, 64, 64)).shape == (2, 512, 1, 1)  # before the fully connected layers


def test_the_small_network_is_small():
    assert sum(p.numel() for p in build_model().parameters()) == 126_072
    assert build_model().trunk(torch.rand(2, 3, 64, 64)).shape == (2, 96)
    with pytest.raises(ValueError, match="must be one of small, official, but got large"):
        build_model(ModelConfig("large"))


def batch_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 64, 64, generator=generator), (torch.rand(count, 40, generator=generator) < 0.4).float()


def test_a_step_of_the_official_network():
    torch.manual_seed(0)
    model = build_model(ModelConfig("official"))
    batch = batch_of(3)
    balancer = Balancer(tasks=TASKS)
    optimizer = torch.optim.Adam(model.parameters(), 3e-4)
    features = model.trunk(batch[0])
    outputs = model.heads(features)
    assert list(outputs) == list(TASKS)
    assert all(output.shape == (3,) for output in outputs.values())
    losses = celeba.losses(outputs, batch)
    for k, task in enumerate(TASKS):
        p = 1 / (1 + np.exp(-outputs[task].detach().double().numpy()))
        y = batch[1][:, k].numpy()
        assert losses[task].item() == pytest.approx(-np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)), rel=1e-5)
    before = [p.detach().clone() for p in model.parameters()]
    balancer.backward(losses, shared=model.trunk.parameters(), features=features)
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_loss_reaches_its_own_head_only():
    model = build_model()
    batch = batch_of(4)
    losses = celeba.losses(model(batch[0]), batch)
    heads = [head.weight for head in model.heads.values()]
    reached = torch.autograd.grad(losses["bald"], heads, allow_unused=True)
    assert [task for task, gradient in zip(TASKS, reached, strict=True) if gradient is not None] == ["bald"]


def test_forty_tasks_go_through_a_gradient_balancer():
    torch.manual_seed(0)
    model = build_model()
    batch = batch_of(4)
    features = model.trunk(batch[0])
    balancer = Balancer(tasks=TASKS, loss="famo", gradient="pcgrad", source="features")
    report = balancer.backward(celeba.losses(model.heads(features), batch), shared=model.trunk.parameters(), features=features)
    assert report.gramian.shape == (40, 40)
    assert all(p.grad is not None for p in model.parameters())


def test_names_of_tasks_and_metrics():
    assert len(set(TASKS)) == 40
    assert all(task.isascii() and task == task.lower() for task in TASKS)
    assert (TASKS[0], TASKS[20], TASKS[39]) == ("5_o_clock_shadow", "male", "young")
    assert set(celeba.metrics()) == HIGHER_IS_BETTER == {f"{task}/f1" for task in TASKS}


def official_f1(answers, labels):
    """F1 as the FAMO repository defines it."""
    tp, fp, fn = (answers * labels).sum(), (answers * (1 - labels)).sum(), ((1 - answers) * labels).sum()
    precision, recall = tp / (tp + fp + 1e-8), tp / (tp + fn + 1e-8)
    return 2 * precision * recall / (precision + recall + 1e-8)


def test_f1_is_that_of_the_papers_over_all_batches():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(90, 40, generator=generator) - 1
    logits[:, 3] = -2  # no positive answer
    batch = (torch.zeros(90, 1), (torch.rand(90, 40, generator=generator) < 0.3).float())
    batch[1][:, 4] = 0  # no positive label
    metrics = celeba.metrics()
    for part in (slice(0, 20), slice(20, 90)):
        targets = celeba.targets((batch[0][part], batch[1][part]))
        for k, task in enumerate(TASKS):
            metrics[f"{task}/f1"].update(logits[part, k], targets[task])
    for k, task in enumerate(TASKS):
        expected = official_f1((logits[:, k] > 0).double().numpy(), batch[1][:, k].double().numpy())
        assert metrics[f"{task}/f1"].compute().item() == pytest.approx(expected, abs=1e-6)


def test_logits_are_never_taken_for_probabilities():
    """Logits in 0..1 mean probabilities above 0.5; torchmetrics' own class compares them with 0.5."""
    logits, labels = torch.tensor([0.1, 0.4, 0.9, 0.2]), torch.tensor([1, 1, 1, 0])
    assert celeba.metrics()["bald/f1"](logits, labels).item() == pytest.approx(6 / 7)
    assert BinaryF1Score()(logits, labels).item() == pytest.approx(0.5)
