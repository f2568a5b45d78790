import torch

from graphprune.demo.data import CLASSES, augment, load_trained_network, sample


def test_the_shipped_weights_classify_the_shipped_test_images() -> None:
    model, test = load_trained_network(), sample("test")
    with torch.no_grad():
        right = model(test.images).argmax(1) == test.labels
    assert not model.training
    assert float(right.float().mean()) >= 0.93


def test_the_sample_has_the_stated_shapes_and_kinds() -> None:
    for data, count in ((sample("train"), 1250), (sample("test"), 1000)):
        assert data.images.shape == (count, 1, 28, 28)
        assert data.images.dtype == torch.float32
        assert abs(float(data.images.mean())) < 0.05
        assert abs(float(data.images.std()) - 1) < 0.05
        assert data.labels.shape == (count,)
        assert data.labels.dtype == torch.int64
        assert set(data.labels.tolist()) == set(range(len(CLASSES)))


def test_batches_hold_every_image_once_with_its_label() -> None:
    data = sample("test")
    batches = list(data.batches(300, torch.Generator().manual_seed(0)))
    assert [len(batch.labels) for batch in batches] == [300, 300, 300, 100]
    seen = {
        (float(image.sum()), int(label)) for b in batches for image, label in zip(*b, strict=True)
    }
    assert seen == {(float(i.sum()), int(n)) for i, n in zip(*data, strict=True)}


def test_augmenting_shifts_by_two_pixels_at_most_and_mirrors_half() -> None:
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, 10, 5] = 100.0
    views = augment(image.expand(500, -1, -1, -1), torch.Generator().manual_seed(0))
    places = (views == 100.0).nonzero()
    assert len(places) == 500
    assert set(places[:, 2].tolist()) == set(range(8, 13))
    assert set(places[:, 3].tolist()) == {3, 4, 5, 6, 7, 20, 21, 22, 23, 24}
    assert 200 < int((places[:, 3] < 14).sum()) < 300


def test_augmenting_is_repeatable() -> None:
    images = sample("test").images[:16]
    first, second = (augment(images, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
