"""All that processes do with each other, once: every process writes what it saw as one line of JSON."""

import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mtjax import distributed

distributed.initialize()
distributed.initialize()  # a second call does nothing
seen = {"id": distributed.process_id(), "count": distributed.process_count(), "main": distributed.is_main()}
with distributed.only_main_prints():
    print(f"printed by {seen['id']}")
    print(f"warning of {seen['id']}", file=sys.stderr)

mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = np.arange(2 * jax.local_device_count(), dtype=np.float32) + 100 * seen["id"]
split = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("data")), rows)
seen["devices"] = jax.device_count()
seen["sum"] = float(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(split))

seen["agreed"] = [distributed.agree(says) for says in (False, seen["id"] == 1, False, True, seen["id"] == 0)]
began = time.perf_counter()
for _ in range(100):
    distributed.agree(False)
seen["agree_ms"] = (time.perf_counter() - began) / 100 * 1e3

# The first to arrive waits for the last: nobody is past the barrier before everybody wrote the file.
folder = pathlib.Path(sys.argv[1])
time.sleep(0.2 * seen["id"])
(folder / f"arrived-{seen['id']}").touch()
distributed.barrier("everybody wrote")
seen["arrived"] = len(list(folder.glob("arrived-*")))
distributed.barrier("everybody wrote")  # a name may be used again
try:
    if seen["id"] == 0:
        distributed.barrier("lonely", timeout_s=0.2)
except TimeoutError as error:
    seen["lonely"] = str(error)
distributed.barrier("end")
(folder / f"{seen['id']}.json").write_text(json.dumps(seen))
