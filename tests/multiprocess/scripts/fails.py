"""One process fails and the other waits: HOW (raises, exits, returns, SIG...), WHO, and in WHAT the other waits."""

import os
import signal
import sys

import jax
import jax.numpy as jnp

from mtjax import distributed

distributed.initialize()
how, who, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split = jax.NamedSharding(mesh, jax.P("data"))
total = jax.jit(lambda x: jnp.sum(x + 1), out_shardings=jax.NamedSharding(mesh, jax.P()))
ones = jax.make_array_from_process_local_data(split, jnp.ones(jax.local_device_count()))
if what == "collective":
    total(ones).block_until_ready()
distributed.barrier("both are there")
try:
    with distributed.only_main_prints():
        if distributed.process_id() == who:
            if how in ("raises", "returns"):
                raise FileNotFoundError("no rows in the folder")
            if how == "exits":
                sys.exit(7)
            os.kill(os.getpid(), getattr(signal, how))
        if what == "collective":
            total(ones).block_until_ready()
        distributed.agree(False)
except FileNotFoundError as error:
    if how == "raises":
        raise
    print(f"error: {error}", file=sys.stderr)
    distributed.leave_at_exit(2)
    sys.exit(2)
