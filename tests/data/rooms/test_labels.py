"""Labels from what rays saw: exact cases of planes, steps and creases, and boxes against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from mtjax.data.rooms import labels

occlusions, creases, contours = (jax.jit(f) for f in (labels.occlusions, labels.creases, labels.contours))
depth_holes, salient, sobel = (
    jax.jit(labels.depth_holes),
    jax.jit(labels.salient, static_argnums=1),
    jax.jit(labels.sobel),
)


def plane_depth(normal, distance, size=16):
    """Depth of the plane normal . p = distance through the pixels of a camera of focal length 1."""
    x, y = np.meshgrid((np.arange(size) * 2 + 1) / size - 1, (np.arange(size) * 2 + 1) / size - 1)
    return distance / (normal[0] * x + normal[1] * y + normal[2])


def test_a_plane_has_no_occlusion_however_grazing():
    floor = plane_depth((0.0, 1.0, 0.0), 0.2)[8:]  # from 0.2 to 3.2 m within 8 rows
    assert floor.max() / floor.min() > 10
    # Not even where two primitives lie in the same plane.
    surface = np.arange(floor.size).reshape(floor.shape)
    assert not np.any(occlusions(jnp.asarray(floor, jnp.float32), jnp.asarray(surface)))


def test_a_step_is_marked_once_and_only_where_the_surface_changes():
    depth = jnp.where(jnp.arange(8)[None, :] < 5, 2.0, 3.0) * jnp.ones((8, 1))
    surface = (jnp.arange(8)[None, :] < 5).astype(jnp.int32) * jnp.ones((8, 1), jnp.int32)
    expected = np.zeros((8, 8), bool)
    expected[:, 4] = True
    np.testing.assert_array_equal(occlusions(depth, surface), expected)
    assert not np.any(occlusions(depth, jnp.zeros_like(surface)))
    # The sky is infinitely far.
    sky = np.where(depth == 3.0, np.inf, depth)
    np.testing.assert_array_equal(occlusions(sky, surface), expected)


def test_creases_and_contours():
    normal = np.zeros((3, 6, 6), np.float32)
    normal[2, :, :3], normal[0, :, 3:] = -1, 1
    flat = jnp.zeros((6, 6), bool)
    surface = jnp.zeros((6, 6), jnp.int32)
    expected = np.zeros((6, 6), bool)
    expected[:, 2] = True
    np.testing.assert_array_equal(creases(jnp.asarray(normal), surface, flat), expected)
    assert not np.any(creases(jnp.asarray(normal), surface, ~flat))  # one round surface
    identity = jnp.asarray(np.pad(np.ones((2, 2), np.int32), ((2, 2), (2, 2))))
    np.testing.assert_array_equal(
        contours(identity),
        [[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 1, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0] * 6, [0] * 6],
    )


def test_depth_holes_one_by_one():
    ones = jnp.ones((4, 12))

    def holes(**changes):
        given = {"depth": 2 * ones, "facing": ones, "brightness": ones, "speckle": ones}
        return np.asarray(depth_holes(**(given | changes), focal=jnp.asarray(1.0)))

    assert not holes().any()
    for name in ("facing", "brightness", "speckle"):
        value = ones.at[1, 2].set(0.0)
        assert holes(**{name: value}).sum() == 1 and holes(**{name: value})[1, 2]
    # Base .075 m, focal length 6 pixels: disparities 2.25 and .225 differ by 2: two columns are in the shadow.
    near = jnp.where(jnp.arange(12)[None, :] >= 6, 0.2, 2.0) * jnp.ones((4, 1))
    assert holes(depth=near).sum(0).tolist() == [0, 0, 0, 0, 4, 4, 0, 0, 0, 0, 0, 0]


def test_salient_is_central_before_large():
    instance = np.zeros((20, 20), np.int32)
    instance[8:13, 8:13] = 2  # 25 pixels in the middle
    instance[:, 0] = 1  # 20 at the side
    instance[0, 1:19] = 1
    np.testing.assert_array_equal(salient(jnp.asarray(instance), 3), instance == 2)
    instance[:10] = 1
    np.testing.assert_array_equal(salient(jnp.asarray(instance), 3), instance == 1)
    assert not np.any(salient(jnp.zeros((20, 20), jnp.int32), 3))


def test_boxes_equal_a_loop(rng):
    instances = rng.integers(0, 4, (5, 6, 7)).astype(np.uint8)
    instances[1] = 0
    instances[2, :3] = 2
    table = rng.integers(3, 9, 4)
    segmentation = table[instances].astype(np.uint8)
    found, classes = labels.boxes(instances, segmentation, min_pixels=9, count=5)
    assert found.shape == (5, 5, 4) and found.dtype == np.float32 and classes.dtype == np.int32
    for image in range(5):
        for number in range(1, 6):
            rows, columns = np.nonzero(instances[image] == number)
            if len(rows) < 9:
                assert classes[image, number - 1] == -1 and not found[image, number - 1].any()
                continue
            expected = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
            np.testing.assert_array_equal(found[image, number - 1], expected)
            assert classes[image, number - 1] == table[number]


def test_boxes_of_things_only_and_of_nothing():
    instances = np.zeros((1, 8, 8), np.uint8)
    assert labels.boxes(instances, instances)[0].shape == (1, 0, 4)
    instances[0, :2], instances[0, 4:6], instances[0, 7] = 1, 2, 3
    segmentation = np.choose(instances, [0, 5, 7, 255]).astype(np.uint8)
    assert labels.boxes(instances, segmentation)[1].tolist() == [[5, 7, -1]]
    assert labels.boxes(instances, segmentation, things=(7,))[1].tolist() == [[-1, 7, -1]]
    with pytest.raises(ValueError, match="count=2 boxes are too few for instance 3"):
        labels.boxes(instances, segmentation, count=2)


def test_panoptic_ids_give_both_back():
    segmentation = np.array([[0, 5, 5, 255]], np.uint8)
    ids = labels.panoptic(segmentation, np.array([[0, 1, 2, 3]], np.uint8))
    assert ids.tolist() == [[0, 5 * 256 + 1, 5 * 256 + 2, -1]]


def test_sobel_is_scipys(rng):
    image = rng.random((9, 12)).astype(np.float32)
    expected = np.hypot(ndimage.sobel(image, 0, mode="nearest"), ndimage.sobel(image, 1, mode="nearest")) / 4
    np.testing.assert_allclose(sobel(jnp.asarray(image)), expected, atol=1e-5)
