import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from experiments.datasets.rooms import CLASSES, MERGED, Scene, arrays, cached, draw, render, seeds, write
from experiments.datasets.rooms.__main__ import main
from experiments.datasets.rooms.rays import around_y, view
from experiments.datasets.rooms.room import LABELS, Box, Camera, Sphere, draw_materials

HEIGHT, WIDTH = 72, 96
INNER = (slice(2, -2), slice(2, -2))


@pytest.fixture(scope="module")
def samples():
    return [render(seed) for seed in range(40)]


def room(boxes=(), spheres=(), position=(2.5, 1.3, 4.0), yaw=0.0, pitch=0.0):
    """A room of 5 x 2.6 x 5 m with a known camera."""
    materials = draw_materials(np.random.default_rng(0), 3 + len(boxes) + len(spheres))
    camera = Camera(np.array(position), yaw, pitch)
    return Scene(np.array([5, 2.6, 5]), camera, boxes, spheres, np.array([2.5, 2.3, 2.5]), 3.0, materials)


def rays(height=HEIGHT, width=WIDTH):
    return view(height, width).reshape(height, width, 3)


def test_types_and_ranges(samples):
    for sample in samples:
        assert [part.shape for part in sample] == [(72, 96, 3), (72, 96), (72, 96, 1), (72, 96, 3)]
        assert all(part.dtype == np.float32 for part in sample)
        assert 0 <= sample.image.min() < sample.image.max() <= 1
        assert set(np.unique(sample.label)) <= set(range(-1, 13))
        assert sample.depth.min() >= 0
        assert sample.depth.max() < 10
        length = np.linalg.norm(sample.normal, axis=-1)
        assert (np.isclose(length, 1, atol=1e-6) | (length == 0)).all()


def test_normals_are_those_of_the_depth(samples):
    """Against cross products of finite differences of the back-projected depth; large errors lie on edges or balls."""
    errors, flat = [], []
    for sample in samples:
        points = rays() * sample.depth
        across, down = np.diff(points, axis=1)[:-1], np.diff(points, axis=0)[:, :-1]
        normal = np.cross(down, across)
        known = (sample.depth > 0)[..., 0]
        known = known[:-1, :-1] & known[:-1, 1:] & known[1:, :-1]
        seen = np.concatenate([sample.normal, sample.label[..., None]], -1)
        same = (np.diff(seen, axis=1)[:-1] == 0).all(-1) & (np.diff(seen, axis=0)[:, :-1] == 0).all(-1)
        flat.append(same[known])
        cosine = (normal[known] * sample.normal[:-1, :-1][known]).sum(1) / np.linalg.norm(normal[known], axis=1)
        errors.append(np.degrees(np.arccos(cosine.clip(-1, 1))))
    errors, flat = np.concatenate(errors), np.concatenate(flat)
    assert np.median(errors) < 0.05
    assert (errors < 2).mean() > 0.9
    assert (errors[flat] < 2).mean() > 0.995
    assert flat.mean() > 0.85


def test_no_normal_points_away_from_the_camera_and_none_is_seen_at_a_grazing_angle(samples):
    for sample in samples:
        known = sample.depth[..., 0] > 0
        cosine = -(sample.normal * rays()).sum(-1) / np.linalg.norm(rays(), axis=-1)
        assert cosine[known].min() >= 0.08 - 1e-6
        assert np.array_equal(known, (sample.normal != 0).any(-1))


def test_every_class_occurs(samples):
    labels = np.stack([sample.label for sample in samples])
    assert all((labels == label).sum() > 200 for label in range(13)), CLASSES
    assert all((labels == label).any((1, 2)).sum() >= 5 for label in range(13))


def test_border_and_a_hundredth_of_the_labels_are_unknown(samples):
    border = np.ones((HEIGHT, WIDTH), bool)
    border[INNER] = False
    for sample in samples:
        assert (sample.label[border] == -1).all()
        assert (sample.depth[border] == 0).all()
        assert (sample.normal[border] == 0).all()
    labels = np.stack([sample.label[INNER] for sample in samples])
    assert (labels == -1).mean() == pytest.approx(0.01, abs=0.001)


def test_a_surface_at_a_grazing_angle_has_a_label_but_no_depth():
    table = Box(LABELS["table"], np.array([2.5, 0.63, 2.0]), np.array([0.5, 0.63, 0.5]), 0.0)  # its top is 4 cm below the eye
    sample = render(room((table,)), 144, 192)
    top = (sample.label == LABELS["table"]) & (rays(144, 192)[..., 1] > -0.04 / 1.5)
    assert top.sum() > 30
    assert (sample.depth[top] == 0).all()
    front = (sample.label == LABELS["table"]) & (rays(144, 192)[..., 1] < -0.04 / 1.5)
    assert (sample.depth[front] == np.float32(1.5)).all()


def test_depth_of_an_empty_room():
    sample = render(room())
    x, y, _ = np.moveaxis(rays(), -1, 0)
    expected = np.minimum(np.minimum(2.5 / np.abs(x), 1.3 / np.abs(y)), 4)
    known = sample.depth[..., 0] > 0
    assert known[INNER].all()
    np.testing.assert_allclose(sample.depth[..., 0][known], expected[known], rtol=1e-6)
    assert (sample.depth[30:40, 40:60] == 4).all()
    assert sample.normal[36, 48].tolist() == [0, 0, 1]
    assert sample.normal[69, 48].tolist() == [0, 1, 0]
    assert {int(label) for label in np.unique(sample.label)} == {-1, *(LABELS[name] for name in ("ceiling", "floor", "wall"))}


def test_depth_and_normals_follow_the_camera():
    """The middle of an image of odd size is on the axis."""
    turned = render(room(yaw=0.3, pitch=0.1), 73, 97)
    assert turned.depth[36, 48, 0] == pytest.approx(4 / np.cos(0.3) / np.cos(0.1), rel=1e-6)
    slightly = render(room(yaw=0.1), 73, 97).depth[36, :, 0]
    assert slightly[10] > slightly[86]  # the camera looks to the left, so the wall in front recedes there
    down = render(room(pitch=-0.3), 73, 97)
    np.testing.assert_allclose(down.normal[68, 48], [0, np.cos(0.3), np.sin(0.3)], atol=1e-6)
    low = render(room(position=(0.5, 1.3, 4.0), yaw=np.pi / 2), 73, 97)
    assert low.depth[36, 48, 0] == pytest.approx(0.5, rel=1e-6)  # a quarter turn to the left faces the wall at x = 0


def test_depth_of_a_ball_and_of_a_turned_box():
    ball = render(room(spheres=(Sphere(LABELS["objects"], np.array([2.5, 1.3, 2.0]), 0.3),)), 73, 97)
    assert ball.depth[36, 48, 0] == pytest.approx(1.7, rel=1e-6)
    np.testing.assert_allclose(ball.normal[36, 48], [0, 0, 1], atol=1e-6)
    box = Box(LABELS["chair"], np.array([2.5, 1.3, 2.0]), np.array([0.2, 0.2, 0.2]), np.pi / 4)  # an edge towards the camera
    turned = render(room((box,)), 73, 97)
    assert turned.depth[36, 47:50, 0].min() == pytest.approx(2 - 0.2 * np.sqrt(2), rel=0.01)
    np.testing.assert_allclose(turned.normal[36, 45], [-np.sqrt(0.5), 0, np.sqrt(0.5)], atol=1e-6)
    np.testing.assert_allclose(turned.normal[36, 51], [np.sqrt(0.5), 0, np.sqrt(0.5)], atol=1e-6)


def test_the_camera_is_in_the_room_and_in_no_object():
    for seed in range(500):
        scene = draw(seed)
        position = scene.camera.position
        assert (position > 0.3 - 1e-9).all()
        assert (position < scene.size - 0.3 + 1e-9).all()
        for box in scene.boxes:
            outside = np.abs((position - box.centre) @ around_y(box.yaw)) - box.half
            assert outside.max() > 0.3
        assert all(np.linalg.norm(position - ball.centre) > ball.radius + 0.3 for ball in scene.spheres)


def test_furniture_is_as_large_as_its_class():
    sizes = [2 * box.half for seed in range(100) for box in draw(seed).boxes if box.label == LABELS["sofa"]]
    assert np.min(sizes, 0) / (1.7, 0.8, 0.8) == pytest.approx(0.8, abs=0.05)
    assert np.max(sizes, 0) / (1.7, 0.8, 0.8) == pytest.approx(1.2, abs=0.05)
    counts = {sum(box.label not in (7, 12) for box in scene.boxes) + len(scene.spheres) for scene in map(draw, range(100))}
    assert counts == {5, 6, 7, 8, 9}


def test_a_scene_is_a_function_of_its_seed():
    assert all(np.array_equal(a, b) for a, b in zip(render(7), render(7), strict=True))
    assert not np.array_equal(render(7).depth, render(8).depth)
    assert np.array_equal(render(7).depth, render(draw(7)).depth)


def test_splits_share_no_scene():
    used = [set(seeds(split, 10_000)) for split in ("train", "val", "test")]
    assert len(set.union(*used)) == 30_000
    assert [min(part) for part in used] == [0, 10_000, 20_000]
    assert np.array_equal(arrays("val", 2)["depth"][1], render(10_001).depth)
    with pytest.raises(ValueError, match="1 to 10000 scenes, but got 10001 for 'train'"):
        seeds("train", 10_001)
    with pytest.raises(ValueError, match="Did you mean 'val'"):
        seeds("vall", 1)


def test_classes_and_inverse_depth_of_cityscapes():
    assert sorted(name for names in MERGED.values() for name in names) == sorted(CLASSES)
    indoor, street = arrays("train", 10), arrays("train", 10, layout="cityscapes")
    assert np.array_equal(indoor["image"], street["image"])
    label = np.vectorize({-1: -1, **{LABELS[c]: i for i, names in enumerate(MERGED.values()) for c in names}}.get)
    assert np.array_equal(label(indoor["label"]), street["label_7"])
    known = indoor["depth"] > 0
    np.testing.assert_allclose(street["depth"][known] * indoor["depth"][known], 0.2, rtol=1e-6)
    assert (street["depth"][~known] == 0).all()
    assert street["depth"].max() < 0.4922


def test_files_on_disk(tmp_path):
    counts = {"train": 3, "val": 2, "test": 1}
    assert write(tmp_path, counts, height=16, width=24) == 6
    files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.npy"))
    assert files == sorted(
        f"{split}/{part}/{i}.npy"
        for split, n in counts.items()
        for part in ("image", "label", "depth", "normal")
        for i in range(n)
    )
    for part, array in arrays("train", 3, height=16, width=24).items():
        assert np.array_equal(np.load(tmp_path / "train" / part / "2.npy"), array[2])


def test_what_is_there_is_not_rendered_again(tmp_path):
    counts = {"train": 3, "val": 2}
    write(tmp_path, counts, height=16, width=24)
    assert write(tmp_path, counts, height=16, width=24) == 0
    assert write(tmp_path, {"train": 5}, height=16, width=24) == 2
    (tmp_path / "val/depth/1.npy").unlink()
    assert write(tmp_path, counts, height=16, width=24) == 1
    assert np.array_equal(np.load(tmp_path / "val/depth/1.npy"), render(10_001, 16, 24).depth)


def test_nothing_else_is_mixed_with_the_scenes(tmp_path):
    write(tmp_path / "a", {"train": 1}, height=16, width=24)
    with pytest.raises(ValueError, match="has other scenes in it"):
        write(tmp_path / "a", {"train": 1}, height=24, width=24)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="empty or a folder of scenes, but has something else"):
        write(tmp_path / "b", {"train": 1})
    with pytest.raises(ValueError, match="Did you mean 'nyuv2'"):
        write(tmp_path / "c", {"train": 1}, layout="nyu")
    with pytest.raises(ValueError, match="at least 16 x 16"):
        write(tmp_path / "c", {"train": 1}, height=4)


def test_two_can_write_at_a_time(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: cached(tmp_path, {"train": 20}, height=16, width=24), range(2)))
    assert folders[0] == folders[1]
    assert len(list(folders[0].rglob("*"))) == 1 + 1 + 4 + 80  # the note, train, its folders, their files
    for i in range(20):
        assert np.array_equal(np.load(folders[0] / f"train/image/{i}.npy"), render(i, 16, 24).image)


def test_command_line(tmp_path, capsys):
    sizes = ["--height=16", "--width=24", "--train=2", "--val=1", "--test=1"]
    assert main(["--output", str(tmp_path / "s"), "--layout=cityscapes", *sizes]) == 0
    assert "4 scenes rendered" in capsys.readouterr().out
    assert (tmp_path / "s/test/label_7/0.npy").exists()
    assert json.loads((tmp_path / "s/scenes.json").read_text())["layout"] == "cityscapes"
    with pytest.raises(SystemExit, match="2"):
        main(["--output", str(tmp_path / "s"), *sizes])
    assert "has other scenes in it" in capsys.readouterr().err
