"""Ray casting of a scene: what every pixel sees, how far it is, which way it faces and what colour it has.

One ray per pixel, o + t d with d scaled to unit z in the camera's frame, so that t is the depth. A scan over the
primitives keeps (t, index) of the nearest hit; position, normal and material are computed once, for the winner:

    box        slabs: t = max_i (-s_i h_i - o_i) / d_i if it is below min_i (s_i h_i - o_i) / d_i,  s = sign(d)
    cylinder   |o_xz + t d_xz|^2 = r^2 where |y| <= h, else the cap on that side
    capsule    the same, with a half ball on that side; a sphere is a capsule with h = 0

The box of faces around everything is met at min_i (s_i H_i - o_i) / d_i. One shadow ray goes to the light, and
colour = albedo (ambient + strength n.l / |l|^2) + a small specular term, with solid textures.

Letters: N rays, P primitives, F = 6 faces. Vectors are [3, N]: the long axis is last.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtjax.data.rooms import grammar
from mtjax.data.rooms.scene import Array, Primitives, Scene

TEXTURE_NONE, CHECKER, STRIPES, NOISE = range(4)
_NEAR = 1e-3
_FAR = 1e9
_TINY = 1e-9


class Seen(NamedTuple):
    """What N rays see."""

    depth: Array  # f32[N], along the camera's axis
    surface: Array  # i32[N], index of the primitive, or P + face
    normal: Array  # f32[3, N], in the camera's frame, towards the camera
    curved: Array  # bool[N], on the round side of a cylinder or a capsule
    curvature: Array  # f32[2, N], principal curvatures, larger first, 1/m
    facing: Array  # f32[N], cosine between the normal and the way to the camera
    label: Array  # i32[N]
    instance: Array  # i32[N]
    part: Array  # i32[N]
    colour: Array  # f32[3, N], linear


def rays(shape: tuple[int, int], focal: Array) -> Array:
    """Directions f32[3, H W] in the camera's frame, of unit z, through the middles of the pixels."""
    height, width = shape
    across = ((jnp.arange(width) * 2 + 1) / width - 1) / focal
    down = ((jnp.arange(height) * 2 + 1) / height - 1) * (height / width) / focal
    x, y = jnp.broadcast_to(across[None, :], shape), jnp.broadcast_to(down[:, None], shape)
    return jnp.stack([x.ravel(), y.ravel(), jnp.ones(height * width)])


def _apply(rotation: Array, vector: Array) -> list[Array]:
    """rotation f32[3, 3] times vectors f32[3, N], written out: three long sums are faster than a tiny product."""
    return [sum(rotation[i, j] * vector[j] for j in range(3)) for i in range(3)]


def _hit(origin: list[Array], way: list[Array], squared: Array, shape: Array, half: Array) -> Array:
    """Distance f32[N] at which rays in the frame of a primitive meet it, _FAR if they do not."""
    inverse = [1 / jnp.where(jnp.abs(w) < _TINY, _TINY, w) for w in way]
    middle = [-o * i for o, i in zip(origin, inverse, strict=True)]
    spread = [half[a] * jnp.abs(inverse[a]) for a in range(3)]
    enter = jnp.maximum(jnp.maximum(middle[0] - spread[0], middle[1] - spread[1]), middle[2] - spread[2])
    leave = jnp.minimum(jnp.minimum(middle[0] + spread[0], middle[1] + spread[1]), middle[2] + spread[2])
    box = jnp.where(enter < leave, enter, _FAR)

    radius, length = half[0] * half[0], half[1]
    a = jnp.maximum(way[0] * way[0] + way[2] * way[2], _TINY)
    b = origin[0] * way[0] + origin[2] * way[2]
    c = origin[0] * origin[0] + origin[2] * origin[2] - radius
    inside = b * b - a * c
    side = (-b - jnp.sqrt(jnp.maximum(inside, 0.0))) / a
    y = origin[1] + side * way[1]
    on_side = jnp.abs(y) <= length
    cap = jnp.where(y > 0, length, -length)
    flat = (cap - origin[1]) * inverse[1]
    in_disc = a * flat * flat + 2 * b * flat + c <= 0
    tube = jnp.where(on_side, side, jnp.where(in_disc, flat, _FAR))
    above = origin[1] - cap
    b_ball = b + above * way[1]
    inside_ball = b_ball * b_ball - squared * (c + above * above)
    ball = (-b_ball - jnp.sqrt(jnp.maximum(inside_ball, 0.0))) / squared
    pill = jnp.where(on_side, side, jnp.where(inside_ball > 0, ball, _FAR))
    round_ = jnp.where(inside > 0, jnp.where(shape == grammar.CYLINDER, tube, pill), _FAR)
    distance = jnp.where(shape == grammar.BOX, box, round_)
    return jnp.where((distance > _NEAR) & (shape != grammar.NONE), distance, _FAR)


def _nearest(origin: Array, way: Array, solids: Primitives) -> tuple[Array, Array]:
    """Distance f32[N] and index i32[N] of the first primitive on rays that share an origin f32[3]."""
    squared = jnp.sum(way * way, 0)
    local = jnp.einsum("pji,pj->pi", solids.rotation, origin[None] - solids.centre)

    def step(best, item):
        index, shape, start, rotation, half = item
        distance = _hit([start[a] for a in range(3)], _apply(rotation.T, way), squared, shape, half)
        closer = distance < best[0]
        return (jnp.where(closer, distance, best[0]), jnp.where(closer, index, best[1])), None

    count = way.shape[1]
    start = (jnp.full(count, _FAR), jnp.zeros(count, jnp.int32))
    items = (jnp.arange(len(local)), solids.shape, local, solids.rotation, solids.half)
    return jax.lax.scan(step, start, items)[0]


def _shadowed(points: Array, way: Array, solids: Primitives) -> Array:
    """Whether a primitive lies between points f32[3, N] and points + way, bool[N]."""
    squared = jnp.maximum(jnp.sum(way * way, 0), _TINY)

    def step(dark, item):
        shape, centre, rotation, half = item
        start = _apply(rotation.T, points - centre[:, None])
        return dark | (_hit(start, _apply(rotation.T, way), squared, shape, half) < 1.0), None

    items = (solids.shape, solids.centre, solids.rotation, solids.half)
    return jax.lax.scan(step, jnp.zeros(points.shape[1], bool), items)[0]


def _table(scene: Scene) -> dict[str, Array]:
    """Columns of what a winner has to know, one row per primitive and then per face."""
    solids, faces = scene.primitives, scene.faces
    six = len(faces.label)
    eye = jnp.broadcast_to(jnp.eye(3)[None], (six, 3, 3))
    inwards = jnp.array([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    zeros = jnp.zeros(six, jnp.int32)
    material = jnp.concatenate([solids.material, faces.material])
    surfaces = scene.materials
    columns = {
        "shape": jnp.concatenate([solids.shape, zeros]),
        "centre": jnp.concatenate([solids.centre, jnp.zeros((six, 3))]),
        "rotation": jnp.concatenate([solids.rotation, eye]).reshape(-1, 9),
        "half": jnp.concatenate([solids.half, jnp.ones((six, 3))]),
        "label": jnp.concatenate([solids.label, faces.label]),
        "instance": jnp.concatenate([solids.instance, zeros]),
        "part": jnp.concatenate([solids.part, zeros]),
        "face": jnp.concatenate([jnp.zeros_like(solids.centre), inwards]),
        "colours": surfaces.colours.reshape(-1, 6)[material],
        "texture": surfaces.texture[material],
        "frequency": surfaces.frequency[material],
        "phase": surfaces.phase[material],
        "axis": surfaces.axis[material],
    }
    return columns


def _looked_up(columns: dict[str, Array], index: Array) -> dict[str, Array]:
    """The rows of the winners, [columns, N] each or [N]: one gather for all."""
    widths = {key: 1 if column.ndim == 1 else column.shape[1] for key, column in columns.items()}
    joined = jnp.concatenate([c.astype(jnp.float32).reshape(len(c), -1) for c in columns.values()], 1)
    rows = joined[index].T
    found, start = {}, 0
    for key, width in widths.items():
        part = rows[start : start + width]
        found[key] = part if columns[key].ndim > 1 else part[0].astype(columns[key].dtype)
        start += width
    return found


def _normal(point: Array, found: dict[str, Array]) -> tuple[Array, Array, Array]:
    """Outward normals f32[3, N] in the frame of the primitive at points of its surface, and curvatures f32[2, N]."""
    half, shape = found["half"], found["shape"]
    share = jnp.abs(point) / jnp.maximum(half, _TINY)
    largest = jnp.argmax(share, 0)
    box = jnp.where(jnp.arange(3)[:, None] == largest[None], jnp.sign(point), 0.0)
    above = point[1] - jnp.clip(point[1], -half[1], half[1])
    on_cap = (jnp.abs(point[1]) >= half[1] * (1 - 1e-4)) & (shape == grammar.CYLINDER)
    zero = jnp.zeros_like(above)
    radial = jnp.stack([point[0], jnp.where(shape == grammar.CAPSULE, above, 0.0), point[2]])
    radial = jnp.where(on_cap[None], jnp.stack([zero, jnp.sign(point[1]), zero]), radial)
    curved = ((shape == grammar.CYLINDER) & ~on_cap) | (shape == grammar.CAPSULE)
    normal = jnp.where(
        (shape == grammar.BOX)[None], box, jnp.where((shape == grammar.NONE)[None], found["face"], radial)
    )
    normal /= jnp.maximum(jnp.linalg.norm(normal, axis=0), _TINY)[None]
    bend = jnp.where(curved, 1 / jnp.maximum(half[0], _TINY), 0.0)
    return normal, curved, jnp.stack([bend, jnp.where((shape == grammar.CAPSULE) & (above != 0), bend, 0.0)])


def _albedo(point: Array, found: dict[str, Array]) -> Array:
    """Colour of the surface, f32[3, N]: a solid texture mixes the two colours of the material."""
    place = point * found["frequency"][None] + found["phase"]
    cells = jnp.floor(place + 0.013)
    checker = jnp.sum(cells, 0) % 2
    stripes = (jnp.sum(place * found["axis"], 0) * 2 % 1.0 < 0.5).astype(jnp.float32)
    swirl = jnp.sin(3.1 * place[0] + 2 * jnp.sin(2.3 * place[2])) * jnp.sin(
        2.7 * place[1] + 1.7 * jnp.sin(3.7 * place[0])
    )
    noise = 0.5 + 0.5 * swirl * jnp.cos(4.3 * place[2] + jnp.sin(5.1 * place[1]))
    texture = found["texture"]
    mix = jnp.where(texture == CHECKER, checker, jnp.where(texture == STRIPES, stripes, noise))
    mix = jnp.where(texture == TEXTURE_NONE, 0.0, mix)[None]
    return found["colours"][:3] * (1 - mix) + found["colours"][3:] * mix


def see(scene: Scene, shape: tuple[int, int], *, sky: int | None = None) -> Seen:
    """Casts one ray per pixel.

    Args:
      scene: what there is.
      shape: height and width in pixels.
      sky: class of faces that shine by themselves, are infinitely far and have no normal (NaN).
    """
    camera, solids, faces, light = scene.camera, scene.primitives, scene.faces, scene.light
    way_camera = rays(shape, camera.focal)
    way = jnp.stack(_apply(camera.rotation, way_camera))
    distance, surface = _nearest(camera.position, way, solids)

    start = camera.position - jnp.array([0.0, 1.0, 0.0]) * faces.half[1]
    safe = jnp.where(jnp.abs(way) < _TINY, _TINY, way)
    to_faces = (jnp.sign(safe) * faces.half[:, None] - start[:, None]) / safe
    axis = jnp.argmin(to_faces, 0)
    face_distance = jnp.min(to_faces, 0)
    upper = jnp.take_along_axis(safe, axis[None], 0)[0] > 0
    behind = face_distance < distance
    distance = jnp.where(behind, face_distance, distance)
    surface = jnp.where(behind, len(solids.shape) + 2 * axis + upper, surface)

    found = _looked_up(_table(scene), surface)
    point = camera.position[:, None] + distance[None] * way
    rotation = found["rotation"].reshape(3, 3, -1)
    local = jnp.stack(_apply(jnp.swapaxes(rotation, 0, 1), point - found["centre"]))
    normal, curved, curvature = _normal(local, found)
    normal = jnp.stack(_apply(rotation, normal))
    length = jnp.sqrt(jnp.sum(way * way, 0))
    facing = -jnp.sum(normal * way, 0) / length
    normal = jnp.where((facing < 0)[None], -normal, normal)
    facing = jnp.abs(facing)

    to_light = light.position[:, None] - point
    squared = jnp.maximum(jnp.sum(to_light * to_light, 0), 0.05)
    toward = to_light / jnp.sqrt(squared)[None]
    # The ray starts off the surface, and ends before the light.
    lit = ~_shadowed(point + 2e-3 * normal, to_light - 4e-3 * normal, solids)
    lit = lit.astype(jnp.float32) * light.strength / squared
    diffuse = jnp.maximum(jnp.sum(normal * toward, 0), 0.0)
    bisector = toward - way / length[None]
    shine = jnp.maximum(jnp.sum(normal * bisector, 0) / jnp.maximum(jnp.linalg.norm(bisector, axis=0), _TINY), 0.0)
    ambient = light.ambient * (0.8 + 0.2 * normal[1])
    colour = _albedo(local, found) * (ambient + diffuse * lit)[None] + (0.12 * shine**24 * lit)[None]
    normal = jnp.stack(_apply(camera.rotation.T, normal))
    if sky is not None:
        high = found["label"] == sky
        colour = jnp.where(high[None], found["colours"][:3] * (1.1 - 0.4 * way[1] / length)[None], colour)
        distance = jnp.where(high, jnp.inf, distance)
        normal = jnp.where(high[None], jnp.nan, normal)
    labels = (found["label"], found["instance"], found["part"])
    return Seen(distance, surface, normal, curved, curvature, facing, *labels, colour)


def photograph(colour: Array, noise: Array, gain: Array, gamma: Array, style: dict[str, Any]) -> Array:
    """A camera's picture of linear colours f32[3, N]: gain, gamma, additive sensor noise, in [0, 1]."""
    exposed = jnp.clip(gain * colour, 0.0, 1.0) ** gamma
    return jnp.clip(exposed + style["noise"] * noise, 0.0, 1.0)
