"""Pretrained weights against a vision transformer in numpy that reads timm's names, from files made here."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtjax.models import vit_weights
from mtjax.nn.vit import ViT, ViTConfig, stack_layers

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="weights need safetensors")

PATCH, WIDTH, HEADS, DEPTH, HIDDEN = 4, 8, 2, 2, 16
CONFIG = ViTConfig(patch=PATCH, width=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=HIDDEN / WIDTH, cls_token=True)


def timm_weights(grid=(3, 3), cls=True):
    """All weights of a small `vit_*` of timm, with a classifier."""
    rng = np.random.default_rng(0)
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, grid[0] * grid[1] + cls, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "head.weight": (10, WIDTH),
        "head.bias": (10,),
    }
    layers = {"norm1": (WIDTH,), "norm2": (WIDTH,), "attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
    layers |= {"mlp.fc1": (HIDDEN, WIDTH), "mlp.fc2": (WIDTH, HIDDEN)}
    for index in range(DEPTH):
        for name, shape in layers.items():
            shapes[f"blocks.{index}.{name}.weight"] = shape
            shapes[f"blocks.{index}.{name}.bias"] = shape[:1]
    if not cls:
        del shapes["cls_token"]
    return {name: rng.normal(size=shape).astype(np.float32) * 0.5 for name, shape in shapes.items()}


def hugging_face(weights, prefix="vit."):
    """The same weights under the names of Hugging Face's `ViTForImageClassification`."""
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "norm": "layernorm",
    }
    renamed = {}
    for name, array in weights.items():
        stem, _, kind = name.rpartition(".")
        if name in names:
            renamed[prefix + names[name]] = array
        elif stem == "head":
            renamed[f"classifier.{kind}"] = array
        elif stem.startswith("blocks."):
            _, index, part = stem.split(".", 2)
            base = f"{prefix}encoder.layer.{index}"
            if part == "attn.qkv":
                for piece, values in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                    renamed[f"{base}.attention.attention.{piece}.{kind}"] = values
            else:
                renamed[f"{base}.{names[part]}.{kind}"] = array
        else:
            renamed[f"{prefix}{names[stem]}.{kind}"] = array
    return renamed


def numpy_vit(weights, images):
    """timm's forward pass from its own weights, one image and one head at a time; tokens before the head."""
    erf = np.vectorize(__import__("math").erf)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    outputs = []
    for image in images.astype(np.float64):
        kernel, tokens = weights["patch_embed.proj.weight"], []
        for row in range(0, image.shape[0], PATCH):
            for column in range(0, image.shape[1], PATCH):
                window = image[row : row + PATCH, column : column + PATCH]
                tokens.append(np.einsum("dcij,ijc->d", kernel, window) + weights["patch_embed.proj.bias"])
        x = np.concatenate([weights["cls_token"][0], tokens]) + weights["pos_embed"][0]
        for index in range(DEPTH):
            qkv = linear(norm(x, f"blocks.{index}.norm1"), f"blocks.{index}.attn.qkv").reshape(len(x), 3, HEADS, -1)
            mixed = []
            for head in range(HEADS):
                query, key, value = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
                scores = np.exp(query @ key.T / np.sqrt(WIDTH / HEADS))
                mixed.append(scores / scores.sum(-1, keepdims=True) @ value)
            x = x + linear(np.concatenate(mixed, axis=-1), f"blocks.{index}.attn.proj")
            h = linear(norm(x, f"blocks.{index}.norm2"), f"blocks.{index}.mlp.fc1")
            x = x + linear(0.5 * h * (1 + erf(h / np.sqrt(2))), f"blocks.{index}.mlp.fc2")
        outputs.append(norm(x, "norm")[1:])
    return np.stack(outputs)


@pytest.fixture
def file(tmp_path):
    def write(weights, name="model.safetensors"):
        safetensors_numpy.save_file(
            {key: np.ascontiguousarray(value) for key, value in weights.items()}, tmp_path / name
        )
        return tmp_path / name

    return write


@functools.cache
def initial(grid=(3, 3), cls=True):
    """Initial parameters, as zeros: their values must not matter."""
    config = CONFIG if cls else ViTConfig(**{**CONFIG.__dict__, "cls_token": False})
    images = jnp.zeros((1, grid[0] * PATCH, grid[1] * PATCH, 3))
    shapes = jax.eval_shape(ViT(config).init, jax.random.key(0), images)["params"]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_trunk_computes_what_timm_does(file):
    weights = timm_weights()
    params = vit_weights.load(file(weights), initial())
    images = np.random.default_rng(1).normal(size=(2, 12, 12, 3)).astype(np.float32)
    tokens = jax.jit(lambda p, x: ViT(CONFIG).apply({"params": p}, x)[-1])(params, images)
    np.testing.assert_allclose(tokens, numpy_vit(weights, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["vit.", "", "module.vit."])
def test_hugging_faces_names_and_separate_projections(file, prefix):
    weights = timm_weights()
    renamed = hugging_face(weights, prefix)
    renamed |= {f"{prefix}pooler.dense.weight": np.ones((WIDTH, WIDTH), np.float32)}
    expected = vit_weights.load(file(weights), initial())
    equal(vit_weights.load(file(renamed, "hf.safetensors"), initial()), expected)


def test_types_of_the_file_and_of_the_trunk(file):
    import ml_dtypes

    weights = timm_weights()
    for dtype, tolerance in ((np.float16, 1e-3), (ml_dtypes.bfloat16, 1e-2)):
        params = vit_weights.load(file({name: value.astype(dtype) for name, value in weights.items()}), initial())
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(np.float32)}
        np.testing.assert_allclose(params["norm"]["scale"], weights["norm.weight"], rtol=tolerance)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), initial())
    assert {leaf.dtype.name for leaf in jax.tree.leaves(vit_weights.load(file(weights), half))} == {"bfloat16"}


def test_positions_of_another_grid(file):
    weights = timm_weights(grid=(6, 6))
    height, width = np.mgrid[:6, :6]
    # Linear in the place: bicubic interpolation of such a field is exact away from the border.
    plane = (2.0 * height + 3.0 * width).reshape(36, 1) * np.ones((1, WIDTH))
    weights["pos_embed"] = np.concatenate([np.full((1, WIDTH), 7.0), plane])[None].astype(np.float32)
    path = file(weights)
    positions = vit_weights.load(path, initial((9, 12)), grid=(9, 12))["patch_embed"]["positions"]
    assert positions.shape == (109, WIDTH) and (positions[0] == 7).all()
    inner = positions[1:].reshape(9, 12, WIDTH)[3:6, 4:8]
    rows, columns = (np.arange(3, 6) + 0.5) * 6 / 9 - 0.5, (np.arange(4, 8) + 0.5) * 6 / 12 - 0.5
    expected = 2 * rows[:, None, None] + 3 * columns[None, :, None] + np.zeros((1, 1, WIDTH))
    np.testing.assert_allclose(inner, expected, rtol=1e-5)
    assert vit_weights.load(path, initial((4, 4)))["patch_embed"]["positions"].shape == (17, WIDTH)  # squares
    same = vit_weights.load(path, initial((6, 6)), grid=(6, 6))["patch_embed"]["positions"]
    np.testing.assert_array_equal(same, weights["pos_embed"][0])


def test_grids_that_do_not_fit(file):
    path = file(timm_weights())
    with pytest.raises(ValueError, match=r"54 positions are no square grid of patches; pass grid=\(h, w\)"):
        vit_weights.load(path, initial((6, 9)))
    with pytest.raises(ValueError, match=r"grid=\(6, 6\) has 36 patches, but there are positions for 54"):
        vit_weights.load(path, initial((6, 9)), grid=(6, 6))
    with pytest.raises(ValueError, match=r"file_grid=\(2, 4\) has 8 patches, but there are positions for 9"):
        vit_weights.load(path, initial((6, 9)), grid=(6, 9), file_grid=(2, 4))
    # Positions of a grid of 2 x 6 are those of 3 x 4 as far as their number goes: the grids decide.
    path = file(timm_weights(grid=(3, 4)), "oblong.safetensors")
    turned = vit_weights.load(path, initial((2, 6)), grid=(2, 6), file_grid=(3, 4))["patch_embed"]["positions"]
    kept = vit_weights.load(path, initial((3, 4)), grid=(3, 4), file_grid=(3, 4))["patch_embed"]["positions"]
    assert turned.shape == kept.shape and np.abs(turned - kept).max() > 0.1


def test_a_class_token_that_the_trunk_lacks_goes_with_its_position(file):
    weights = timm_weights()
    params = vit_weights.load(file(weights), initial(cls=False))
    assert "cls" not in params["patch_embed"]
    np.testing.assert_array_equal(params["patch_embed"]["positions"], weights["pos_embed"][0, 1:])
    with pytest.raises(ValueError, match="missing: patch_embed/cls"):
        vit_weights.load(file(timm_weights(cls=False)), initial())


def test_scanned_trunks(file):
    weights = timm_weights()
    groups = {"blocks": ["block_0", "block_1"]}
    scanned = stack_layers(initial(), groups)
    expected = stack_layers(vit_weights.load(file(weights), initial()), groups)
    equal(vit_weights.load(file(weights), scanned), expected)


def test_trunks_with_other_parts_keep_them(file):
    params = dict(initial())
    block = {name: part for name, part in params["block_1"].items() if name != "feed_forward"}
    params["block_1"] = {**block, "experts": {"kernel_in": jnp.full((4, WIDTH, 2), 5.0)}}
    path = file(timm_weights())
    with pytest.raises(ValueError, match="missing: block_1/experts/kernel_in; unexpected: block_1/feed_forward/in/"):
        vit_weights.load(path, params)
    loaded = vit_weights.load(path, params, keep=["*/experts/*"], unused=["block_1/feed_forward/*"])
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    assert (loaded["block_1"]["experts"]["kernel_in"] == 5).all() and (loaded["block_1"]["norm_1"]["scale"] != 0).all()


def test_what_does_not_match_is_named(file):
    weights = timm_weights()
    less = {name: value for name, value in weights.items() if name != "blocks.1.mlp.fc2.bias"}
    with pytest.raises(ValueError, match=r"does not hold .* missing: block_1/feed_forward/out/bias$"):
        vit_weights.load(file(less), initial())
    more = {
        **weights,
        "blocks.0.ls1.gamma": np.ones(WIDTH, np.float32),
        "dist_token": np.ones((1, 1, WIDTH), np.float32),
    }
    with pytest.raises(ValueError, match=r"plain vision transformer .* it has no blocks\.0\.ls1\.gamma, dist_token$"):
        vit_weights.load(file(more), initial())
    deeper = {**weights, **{name.replace(".1.", ".2."): value for name, value in weights.items() if ".1." in name}}
    with pytest.raises(ValueError, match=r"unexpected: block_2/.* and 7 more$"):
        vit_weights.load(file(deeper), initial())
    other = {**weights, "norm.weight": np.ones(2 * WIDTH, np.float32)}
    with pytest.raises(ValueError, match=r"of another shape: norm/scale \(16,\) instead of \(8,\)"):
        vit_weights.load(file(other), initial())
    renamed = hugging_face(weights)
    del renamed["vit.encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(ValueError, match=r"but no encoder\.layer\.1\.attention\.attention\.key\.weight"):
        vit_weights.load(file(renamed), initial())


def test_files_that_are_no_weights(file, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"No file .*nowhere\.safetensors"):
        vit_weights.read(tmp_path / "nowhere.safetensors")
    cut = file(timm_weights())
    cut.write_bytes(cut.read_bytes()[:-100])
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    lying = tmp_path / "lying.safetensors"
    lying.write_bytes(len(header).to_bytes(8, "little") + header)
    for path in (cut, lying):
        with pytest.raises(ValueError, match="is not a safetensors file, or it is cut"):
            vit_weights.read(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        vit_weights.read(lying)


@pytest.mark.slow
def test_equal_to_torch(file):
    """Torch's own convolution, attention and interpolation of positions, at another grid than the file's."""
    torch = pytest.importorskip("torch")
    from torch.nn import functional

    weights = timm_weights()
    params = vit_weights.load(file(weights), initial((5, 4)), grid=(5, 4))
    images = np.random.default_rng(1).normal(size=(2, 20, 16, 3)).astype(np.float32)
    tokens = ViT(CONFIG).apply({"params": params}, images)[-1]

    w = {name: torch.tensor(value) for name, value in weights.items()}
    linear = lambda x, name: functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    norm = lambda x, name: functional.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)  # noqa: E731
    x = torch.tensor(images).permute(0, 3, 1, 2)
    x = functional.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([w["cls_token"].expand(2, -1, -1), x.flatten(2).transpose(1, 2)], 1)
    grid = w["pos_embed"][:, 1:].reshape(1, 3, 3, WIDTH).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(5, 4), mode="bicubic", antialias=True)  # as timm does
    x = x + torch.cat([w["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], 1)
    for index in range(DEPTH):
        qkv = linear(norm(x, f"blocks.{index}.norm1"), f"blocks.{index}.attn.qkv")
        query, key, value = qkv.reshape(2, -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + linear(mixed, f"blocks.{index}.attn.proj")
        hidden = functional.gelu(linear(norm(x, f"blocks.{index}.norm2"), f"blocks.{index}.mlp.fc1"))
        x = x + linear(hidden, f"blocks.{index}.mlp.fc2")
    np.testing.assert_allclose(tokens, norm(x, "norm")[:, 1:], rtol=1e-4, atol=1e-4)
