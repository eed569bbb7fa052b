"""The PyTorch sides of `operators.py`: a bare training loop, and DeepXDE 1.15 on its PyTorch backend.

The bare loop is the shortest there is: hidden layers by `torch.addmm` inside of `nn.Linear`, one matrix product for the
field, the fused Adam; and once more with the products fused as in `operators_steps.py`, to tell apart what comes from
the algebra and what from the compiler.

DeepXDE's loop is the body of `Model.train` without its tests of convergence, callbacks and printing. Its
`DeepONetCartesianProd` applies the activation to the trunk's last map, too; the published networks do not, and
`linear_output=True` takes it out.
"""

import contextlib
import functools
import io
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from operators_measure import Timed
from operators_steps import LEAK, LEARNING_RATE, Size
from torch import nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable] = {
    "leaky_relu": functools.partial(F.leaky_relu, negative_slope=LEAK),
    "tanh": torch.tanh,
    "gelu": functools.partial(F.gelu, approximate="tanh"),
}

os.environ.setdefault("DDE_BACKEND", "pytorch")
try:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import deepxde
    if deepxde.backend.backend_name != "pytorch":
        deepxde, WHY = None, f"its backend is {deepxde.backend.backend_name}; set DDE_BACKEND=pytorch"
except ImportError as error:
    deepxde, WHY = None, str(error)


def setup(threads: int) -> dict[str, str]:
    """Sets the number of threads; returns the versions."""
    torch.set_num_threads(threads)
    return {"torch": torch.__version__} | ({} if deepxde is None else {"deepxde": deepxde.__version__})


def linear(layer: dict[str, np.ndarray], device: str) -> nn.Linear:
    """`nn.Linear` with the values of a Flax layer."""
    module = nn.Linear(*layer["kernel"].shape)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(np.array(layer["kernel"].T)))
        module.bias.copy_(torch.from_numpy(np.array(layer["bias"])))
    return module.to(device)


def layers(params: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """The layers of an MLP, first to last."""
    return [params[f"dense_{layer}"] for layer in range(len(params) - 1)] + [params["out"]]


class Bare(nn.Module):
    """The network in PyTorch."""

    def __init__(self, size: Size, params: dict[str, Any], *, fused: bool = False, device: str = "cpu"):
        super().__init__()
        self.branch, self.trunk = (
            nn.ModuleList(linear(layer, device) for layer in layers(params[net])) for net in ("branch", "trunk")
        )
        self.bias = nn.Parameter(torch.from_numpy(np.array(params["bias"])).to(device))
        self.activations = [ACTIVATIONS[name] for name in size.activations]
        self.fused = fused

    def forward(self, inputs: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        g, h = inputs, points
        for layer in self.branch[:-1]:
            g = self.activations[0](layer(g))
        for layer in self.trunk[:-1]:
            h = self.activations[1](layer(h))
        left, right = self.branch[-1], self.trunk[-1]
        if not self.fused:
            return left(g) @ right(h).T + self.bias
        maps = torch.cat([left.weight.T, left.bias[None]])
        middle, shift = maps @ right.weight, maps @ right.bias
        offsets = g @ shift[:-1] + shift[-1] + self.bias
        return torch.addmm(middle[-1:], g, middle[:-1]) @ h.T + offsets[:, None]


def bare(name: str, size: Size, params: Any, batch: dict, *, steps: int, fused=False, device="cpu") -> Timed:
    """The bare loop."""
    net = Bare(size, params, fused=fused, device=device)
    inputs, points, values = (torch.from_numpy(batch[key]).to(device) for key in ("inputs", "points", "values"))
    adam = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE, fused=True)

    def run():
        for _ in range(steps):
            loss = F.mse_loss(net(inputs, points), values)
            adam.zero_grad(set_to_none=True)
            loss.backward()
            adam.step()
        return loss.item()  # waits for the device

    return Timed(name, run, steps)


def deepxde_model(size: Size, params: Any, batch: dict, *, linear_output: bool) -> Any:
    """DeepXDE's model with these parameters and this data, ready to train."""
    branch, trunk = (ACTIVATIONS[name] for name in size.activations)
    net = deepxde.nn.DeepONetCartesianProd(
        list(size.branch), list(size.trunk), {"branch": branch, "trunk": trunk}, "Glorot normal"
    )
    if linear_output:
        net.activation_trunk = nn.Identity()
    with torch.no_grad():
        for mine, theirs in ((net.branch, "branch"), (net.trunk, "trunk")):
            for module, layer in zip(mine.linears, layers(params[theirs]), strict=True):
                module.weight.copy_(torch.from_numpy(np.array(layer["kernel"].T)))
                module.bias.copy_(torch.from_numpy(np.array(layer["bias"])))
        net.b[0].copy_(torch.tensor(float(params["bias"][0])))
    x, y = (batch["inputs"], batch["points"]), batch["values"]
    data = deepxde.data.TripleCartesianProd(x, y, (x[0][:1], x[1]), y[:1])
    model = deepxde.Model(data, net)
    with contextlib.redirect_stdout(io.StringIO()):
        model.compile("adam", lr=LEARNING_RATE, loss="MSE")
    return model


def with_deepxde(name: str, size: Size, params: Any, batch: dict, *, steps: int, linear_output: bool = True) -> Timed:
    """DeepXDE's loop."""
    model = deepxde_model(size, params, batch, linear_output=linear_output)

    def run():
        for _ in range(steps):
            state = model.train_state
            state.set_data_train(*model.data.train_next_batch(None))
            model._train_step(state.X_train, state.y_train, state.train_aux_vars)

    return Timed(name, run, steps)


def peak_matmul(size: int, device: str) -> Timed:
    """A square product, whose rate is the ceiling."""
    a, b = (torch.ones(size, size, device=device) for _ in range(2))

    def run():
        for _ in range(10):
            c = a @ b
        return c[0, 0].item()

    return Timed("PyTorch matmul", run, 10)
