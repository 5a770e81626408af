import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import pytest
from PIL import Image

from experiments.datasets import image_cache

NAMES = [f"{letter}.jpg" for letter in "hgfedcba"]  # not in the order of the alphabet
SIZE = (30, 20)


def write_images(folder, seed):
    folder.mkdir()
    generator = np.random.default_rng(seed)
    for name in NAMES:
        Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def source(tmp_path):
    return write_images(tmp_path / "images", 0)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def files(monkeypatch):
    """Files that are decoded, in order."""
    files = []
    original = image_cache.decode

    def decode(file, size):
        files.append(Path(file).name)
        return original(file, size)

    monkeypatch.setattr(image_cache, "decode", decode)
    return files


def pixels(source, folder, **options):
    return np.array(image_cache.mapped(image_cache.decoded(source, NAMES, SIZE, folder, **options), len(NAMES)))


def test_images_are_decoded_once_and_in_order(source, folder, files):
    first = pixels(source, folder)
    assert first.shape == (8, 3, 64, 64)
    for image, name in zip(first, NAMES, strict=True):
        with Image.open(source / name) as original:
            expected = np.asarray(original.resize((64, 64), Image.Resampling.BILINEAR))
        assert (image.transpose(1, 2, 0) == expected).all()
    assert files == NAMES
    assert (pixels(source, folder) == first).all()
    assert files == NAMES


def test_a_cache_of_other_images_is_not_taken(source, folder, files, tmp_path):
    before = pixels(source, folder)
    shutil.copy(source / NAMES[1], source / NAMES[0])
    after = pixels(source, folder)
    assert (before[0] != after[0]).any()
    assert (after[0] == after[1]).all()
    assert len(files) == 16
    assert (pixels(write_images(tmp_path / "other", 1), folder)[2] != after[2]).any()
    assert len(files) == 24
    assert (pixels(source, folder) == after).all()
    image_cache.decoded(source, NAMES[::-1], SIZE, folder)
    assert len(files) == 32


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_a_damaged_cache_is_made_anew(source, folder, files, damage):
    file = image_cache.decoded(source, NAMES, SIZE, folder)
    content = file.read_bytes()
    file.write_bytes(content[:-1] if damage == "cut" else content.replace(b'"format": 1', b'"format": 2', 1))
    assert image_cache.decoded(source, NAMES, SIZE, folder) == file
    assert len(files) == 16
    assert file.read_bytes() == content


def test_an_interrupted_cache_is_not_read(source, folder, monkeypatch):
    def interrupted(file, size):
        if Path(file).name == NAMES[5]:
            raise KeyboardInterrupt
        return np.zeros(image_cache.SHAPE, np.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "CHUNK", 2)
        patch.setattr(image_cache, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pixels(source, folder)
    assert not [file for file in folder.iterdir() if file.suffix != ".lock"]
    assert pixels(source, folder).max((1, 2, 3)).min() > 0


def test_what_a_killed_process_left_is_removed(source, folder):
    file = image_cache.decoded(source, NAMES, SIZE, folder)
    left = file.rename(file.with_name(f"{file.name}.0123.partial"))
    other = folder / "images-0.u8.0123.partial"  # of other images: somebody may be writing to it
    other.touch()
    image_cache.decoded(source, NAMES, SIZE, folder)
    assert file.exists()
    assert not left.exists()
    assert other.exists()


def test_two_at_a_time_decode_once(source, folder, files):
    with ThreadPoolExecutor(2) as threads:
        a, b = threads.map(pixels, [source] * 2, [folder] * 2)
    assert files == NAMES
    assert (a == b).all()


def test_worker_processes_make_the_same_file(source, folder, tmp_path, monkeypatch):
    """In pieces of 3 images; then two processes want the file at once."""
    expected = image_cache.decoded(source, NAMES, SIZE, folder).read_bytes()
    monkeypatch.setattr(image_cache, "CHUNK", 3)
    monkeypatch.setattr(image_cache, "decode", None)  # in this process
    assert image_cache.decoded(source, NAMES, SIZE, tmp_path / "pieces", workers=2).read_bytes() == expected
    arguments = source, NAMES, SIZE, tmp_path / "both"
    made = joblib.Parallel(n_jobs=2)(joblib.delayed(image_cache.decoded)(*arguments) for _ in range(2))
    assert made[0] == made[1]
    assert made[0].read_bytes() == expected
    assert len(list((tmp_path / "both").glob("images-*[!k]"))) == 1


def test_damaged_images_are_named_all_at_once(source, folder):
    for name in NAMES[:3]:
        (source / name).write_bytes((source / name).read_bytes()[:400])
    with pytest.raises(ValueError, match=r"damaged: .*h\.jpg: .*; .*g\.jpg: .*; .*f\.jpg: "):
        pixels(source, folder)


def test_a_full_disk_is_an_error_that_names_the_cache(source, folder, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_cache, "_decode_chunk", full)
    with pytest.raises(OSError, match=r"cannot write .*\.u8 \(No space left on device\).*data\.cache="):
        pixels(source, folder)
    assert not list(folder.glob("*.partial"))
