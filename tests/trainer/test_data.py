"""Data: what each source holds, batches as pure functions of (seed, step), errors of one line."""

import random
import urllib.error

import numpy as np
import pytest
import torch

from fastflow.trainer import data
from fastflow.trainer.data import Batches, DataError
from fastflow.trainer.picture import codec_bits_per_dim, grid

PIL = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def photos():
    pytest.importorskip("sklearn")
    return data.load("photos")


def numbered(n=10, size=4, labels=None):
    """A source whose image i is filled with i."""
    x = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 1, size, size))
    return data.Images("numbers", x, x[:2], labels, None if labels is None else labels[:2])


def test_photos_are_those_of_scikit_learn(photos):
    from sklearn.datasets import load_sample_images

    a, b = load_sample_images().images
    expected = [
        p[32 * i : 32 * i + 32, 512 + 32 * j : 544 + 32 * j]
        for p in (a, b)
        for i in range(13)
        for j in range(4)
    ]
    assert photos.test.shape == (104, 3, 32, 32) and photos.test.dtype == torch.uint8
    assert np.array_equal(photos.test.numpy(), np.stack(expected).transpose(0, 3, 1, 2))
    # training crops end at column 511: the last window of the first photograph's first row is the crop beside the tiles
    assert photos._windows.shape == (2, 3, 427 - 31, 512 - 31, 32, 32)
    assert np.array_equal(photos._windows[1, :, 395, 480], b[395:427, 480:512].transpose(2, 0, 1))


def test_photos_batches_are_random_crops(photos):
    x, labels = Batches(photos, 64, seed=0)[3]
    assert x.shape == (64, 3, 32, 32) and x.dtype == torch.uint8 and labels is None and x.is_contiguous()
    assert len({image.numpy().tobytes() for image in x}) == 64
    plain, _ = Batches(photos, 64, seed=0, horizontal_flip=False)[3]
    mirrored = [not torch.equal(a, b) for a, b in zip(x, plain, strict=True)]
    assert 10 < sum(mirrored) < 54
    assert all(torch.equal(a, b.flip(2) if m else b) for a, b, m in zip(x, plain, mirrored, strict=True))


def test_codecs_on_the_photos(photos):
    bits = codec_bits_per_dim(photos.test)
    assert bits["PNG"] == pytest.approx(3.69, abs=0.01)
    assert bits["WebP"] == pytest.approx(2.9, abs=0.08)  # 2.86 to 2.93, by libwebp's version
    noise = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert codec_bits_per_dim(noise)["PNG"] > 8
    assert codec_bits_per_dim(noise[:, :2]) == {} and codec_bits_per_dim(noise[:0]) == {}


def test_batches_are_a_function_of_seed_and_step():
    source = numbered(10)
    a, b = Batches(source, 4, seed=1), Batches(source, 4, seed=1)
    forward = [a[step][0] for step in range(8)]
    backward = [b[step][0] for step in reversed(range(8))][::-1]
    assert all(torch.equal(x, y) for x, y in zip(forward, backward, strict=True))
    other = Batches(source, 4, seed=2)
    assert not all(torch.equal(x, other[step][0]) for step, x in enumerate(forward))


def test_flips_do_not_depend_on_the_crop():
    class Gradient:
        """Images that grow from left to right; keeps the numbers that choose the crop."""

        length, horizontal_flip = 100, True

        def draw(self, indices, uniform):
            self.uniform = uniform
            return torch.arange(4, dtype=torch.uint8).expand(len(indices), 1, 4, 4), None

    source = Gradient()
    x, _ = Batches(source, 100, seed=0)[0]
    flipped = (x[:, 0, 0, 0] > 0).numpy()
    assert 30 < flipped.sum() < 70
    assert all(30 < (flipped == (numbers < 0.5)).sum() < 70 for numbers in source.uniform.T)


@pytest.mark.parametrize("size", [1, 3, 4, 10, 25])
def test_each_epoch_is_a_permutation_of_its_own(size):
    batches = Batches(numbered(10), size, seed=0)
    order = np.concatenate([batches[step][0][:, 0, 0, 0].numpy() for step in range(50)])
    epochs = order[: len(order) // 10 * 10].reshape(-1, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > len(epochs) // 2


def test_labels_follow_their_images():
    batches = Batches(numbered(10, labels=np.arange(10)), 4, seed=0)
    for step in range(5):
        x, labels = batches[step]
        assert labels.dtype == torch.int64 and torch.equal(x[:, 0, 0, 0].long(), labels)


@pytest.mark.parametrize("n_bits", [1, 5, 8])
def test_fewer_bits_drop_the_lowest_and_pictures_shift_back(n_bits):
    source = numbered(256)
    full, _ = Batches(source, 64, seed=0)[0]
    x, _ = Batches(source, 64, seed=0, n_bits=n_bits)[0]
    assert torch.equal(x, full >> (8 - n_bits)) and int(x.max()) < 2**n_bits
    tile = grid(x[:1], n_bits)[2:6, 2:6]
    assert (tile == (int(full[0, 0, 0, 0]) >> (8 - n_bits)) << (8 - n_bits)).all()


def test_workers_give_the_same_batches_and_no_global_generator_moves(photos):
    batches = Batches(photos, 4, seed=0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with batches.stream(5, 9) as here, batches.stream(5, 9, workers=3) as there:
        here, there = ([x for x, _ in stream] for stream in (here, there))
    assert len(here) == 4 and all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert torch.equal(here[0], batches[5][0])
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1]) and before[2] == random.getstate()


def test_grid_lays_images_out_in_rows():
    images = torch.arange(1, 6, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 2, 3)
    picture = grid(images, columns=3, gap=1)
    assert picture.shape == (7, 13, 3)
    assert (
        (picture[1:3, 1:4] == 1).all() and (picture[1:3, 9:12] == 3).all() and (picture[4:6, 5:8] == 5).all()
    )
    assert (picture[0] == 255).all() and (picture[4:6, 9:12] == 255).all()


def save_images(folder, names, size=(12, 10)):
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)


def test_folder_without_classes_holds_out_by_name(tmp_path):
    names = [f"{i}.png" for i in range(40)]
    save_images(tmp_path, names)
    (tmp_path / "notes.txt").write_text("not an image")
    source = data.load(str(tmp_path), image_size=8)
    assert source.shape == (3, 8, 8) and source.classes is None and source.test_labels is None
    assert source.length + len(source.test) == 40 and 1 <= len(source.test) <= 12
    kept = {f.name for f in source._files}
    save_images(tmp_path, [f"more{i}.png" for i in range(20)])
    again = {f.name for f in data.load(str(tmp_path), image_size=8)._files}
    assert kept == again & set(names)
    x, labels = Batches(source, 5, seed=0)[0]
    assert x.shape == (5, 3, 8, 8) and labels is None


def test_held_out_files_do_not_depend_on_the_place_of_the_folder(tmp_path):
    sources = []
    for place in ("here", "there/in/another/place"):
        save_images(tmp_path / place, [f"{i}.png" for i in range(40)], size=(4, 4))
        sources.append(data.load(str(tmp_path / place), image_size=4))
    first, second = sources
    assert [f.name for f in first._files] == [f.name for f in second._files]


def test_folder_is_resized_and_cropped_in_the_middle(tmp_path):
    wide = np.zeros((16, 48, 3), dtype=np.uint8)
    wide[:, 16:32] = 200  # the middle square
    for name in "ab":
        PIL.fromarray(wide).save(tmp_path / f"{name}.png")
    source = data.load(str(tmp_path), image_size=8)
    x, _ = Batches(source, 1, seed=0)[0]
    assert (x[:, :, :, 1:-1] > 190).all()


def test_folder_with_classes_and_with_a_split(tmp_path):
    save_images(tmp_path / "a", [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(15)])
    source = data.load(str(tmp_path / "a"), image_size=8)
    assert source.classes == 2 and set(source.test_labels.tolist()) <= {0, 1}
    assert [f.parent.name for f in source._files] == [("cat", "dog")[k] for k in source._labels]
    save_images(
        tmp_path / "b",
        [f"{s}/{c}/{i}.png" for s in ("train", "test") for c in ("cat", "dog") for i in range(3)],
    )
    source = data.load(str(tmp_path / "b"), image_size=8)
    assert source.length == 6 and len(source.test) == 6 and source.test_labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_folder_errors(tmp_path):
    with pytest.raises(DataError, match="got no image, expected files"):
        data.load(str(tmp_path))
    save_images(tmp_path, ["one.png"])
    with pytest.raises(DataError, match="got 1 image, expected at least 2"):
        data.load(str(tmp_path))
    save_images(tmp_path, ["two.png", "three.png"])
    (tmp_path / "two.png").write_bytes((tmp_path / "two.png").read_bytes()[:60])
    with pytest.raises(DataError, match="two.png: cannot be read as an image"):
        source = data.load(str(tmp_path), image_size=8)
        Batches(source, 8, seed=0)[0]


def test_npz_layouts_labels_and_split(tmp_path):
    path = tmp_path / "faces.npz"
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (20, 8, 6, 3), dtype=np.uint8)
    y = np.arange(20) % 4
    np.savez(path, x=x, y=y)
    source = data.load(str(path))
    assert (
        source.name == "faces" and source.shape == (3, 8, 6) and source.classes == 4 and source.length == 18
    )
    held_out = np.arange(20) % 10 == 9
    assert np.array_equal(source.test.numpy(), x[held_out].transpose(0, 3, 1, 2))
    assert source.test_labels.tolist() == y[held_out].tolist()
    np.savez(path, x_train=x.transpose(0, 3, 1, 2), x_test=x[:5].transpose(0, 3, 1, 2))
    source = data.load(str(path))
    assert source.length == 20 and len(source.test) == 5 and source.classes is None
    np.savez(path, x[..., 0])
    assert data.load(str(path)).shape == (1, 8, 6)


def test_npz_errors(tmp_path):
    path = tmp_path / "faces.npz"
    x = np.zeros((4, 8, 8, 3), dtype=np.uint8)

    def refused(words, image_size=None, **arrays):
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=words) as caught:
            data.load(str(path), image_size=image_size)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    refused("x: got float64, expected uint8", x=x / 255)
    refused(r"x: got shape \(4, 8, 8, 5\), expected \[N, H, W\]", x=np.zeros((4, 8, 8, 5), np.uint8))
    refused("x: got 0 images", x=x[:0])
    refused("x: got 1 image", x=x[:1])
    refused(r"y: got int64 \(3,\), expected integers", x=x, y=np.arange(3))
    refused("y: got float64", x=x, y=np.zeros(4))
    refused("y: got int64", x=x, y=np.array([0, 1, -1, 0]))
    refused("x_test: got images", x=x, x_test=x[:, :4])
    refused("expected x", a=x, b=x)
    refused("cannot be read", x=np.array([{"an": "object"}] * 4, dtype=object))
    refused("image_size: got 16", image_size=16, x=x)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read as .npz"):
        data.load(str(path))
    with pytest.raises(DataError, match="no such file"):
        data.load(str(tmp_path / "none.npz"))


def test_names_and_sizes():
    with pytest.raises(
        DataError, match="data: got 'imagenet', expected photos, cifar10, mnist, a folder of images, a .npz"
    ):
        data.load("imagenet")
    with pytest.raises(DataError, match="image_size: got 64, expected 32 for photos"):
        data.load("photos", image_size=64)
    with pytest.raises(DataError, match="image_size: got 30, expected 32 or 28 for mnist"):
        data.load("mnist", image_size=30)


def test_torchvision_data_that_is_neither_there_nor_to_be_had(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision").datasets

    def no_network(self):
        raise urllib.error.URLError("Name or service not known")

    for kind, name, file in (
        ("CIFAR10", "cifar10", "cifar-10-batches-py"),
        ("MNIST", "mnist", "train-images-idx3"),
    ):
        monkeypatch.setattr(getattr(datasets, kind), "download", no_network)
        with pytest.raises(
            DataError,
            match=f"{name}: not found, or damaged, and not downloaded .*expected {tmp_path}.*{file}",
        ) as caught:
            data.load(name, data_dir=str(tmp_path))
        assert "\n" not in str(caught.value)


def test_damaged_mnist_files_are_named(tmp_path):
    pytest.importorskip("torchvision")
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    images = np.array([0x803, 3, 28, 28], ">i4").tobytes() + bytes(3 * 784)
    labels = np.array([0x801, 3], ">i4").tobytes() + bytes(3)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    assert data.load("mnist", data_dir=str(tmp_path)).length == 3
    unreadable = "cannot be read as a file of MNIST; without it, it is downloaded again"
    none, small = np.array([0x803, 0, 28, 28], ">i4").tobytes(), np.array([0x803, 3, 14, 14], ">i4").tobytes()
    for name, contents, said in (
        ("t10k-images-idx3-ubyte", images[:500], unreadable),
        ("train-labels-idx1-ubyte", b"", unreadable),
        ("train-images-idx3-ubyte", none, unreadable),
        ("train-images-idx3-ubyte", small + bytes(3 * 196), r"got images \(14, 14\), expected \(28, 28\)"),
        (
            "t10k-labels-idx1-ubyte",
            np.array([0x801, 2], ">i4").tobytes() + bytes(2),
            "got 2 labels, expected 3",
        ),
    ):
        whole = (raw / name).read_bytes()
        (raw / name).write_bytes(contents)
        with pytest.raises(DataError, match=f"{raw / name}: {said}") as caught:
            data.load("mnist", data_dir=str(tmp_path))
        assert "\n" not in str(caught.value)
        (raw / name).write_bytes(whole)


def test_mnist_is_padded(tmp_path):
    pytest.importorskip("torchvision")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, labels = (
        rng.integers(1, 256, (6, 28, 28), dtype=np.uint8),
        np.array([3, 1, 4, 1, 5, 9], dtype=np.uint8),
    )
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            np.array([0x803, 6, 28, 28], ">i4").tobytes() + images.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, 6], ">i4").tobytes() + labels.tobytes()
        )
    source = data.load("mnist", data_dir=str(tmp_path))
    assert source.shape == (1, 32, 32) and source.classes == 10 and not source.horizontal_flip
    assert np.array_equal(source.test.numpy()[:, 0, 2:30, 2:30], images) and source.test.sum() == images.sum()
    assert source.test_labels.tolist() == labels.tolist()
    assert data.load("mnist", data_dir=str(tmp_path), image_size=28).shape == (1, 28, 28)
