"""Families of partial differential equations: random fields, solvers and the data sets made with them.

Every data set is a dictionary of numpy arrays with these keys, where B is functions, N query points, d coordinates:

    'inputs'  {name: f[B, ...]}        what the operator network reads; f[B, ...] where it is one thing
    'points'  f[N, d] or f[B, N, d]    where its output is asked for
    'values'  f[B, N] or f[B, N, C]    the solution there
    'mask'    bool[B, N], optional     points that lie in the domain
    'task'    i32[B]                   functional form or geometry
"""

from mtjax.data.pde import darcy, fisher, gaussian_process, geometry, heat3d, records, store
from mtjax.data.pde.darcy import DarcyConfig
from mtjax.data.pde.fisher import FisherConfig
from mtjax.data.pde.gaussian_process import Kernel
from mtjax.data.pde.geometry import Geometry
from mtjax.data.pde.heat3d import HeatConfig
from mtjax.data.pde.normalizer import Affine, Normalizer

__all__ = [
    "Affine",
    "DarcyConfig",
    "FisherConfig",
    "Geometry",
    "HeatConfig",
    "Kernel",
    "Normalizer",
    "darcy",
    "fisher",
    "gaussian_process",
    "geometry",
    "heat3d",
    "records",
    "store",
]
