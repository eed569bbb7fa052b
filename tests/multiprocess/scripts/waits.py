"""Arguments: seconds to wait for the other process that never starts; prints the errors of `initialize`."""

import sys

from mtjax import distributed
from mtjax.launch import free_port

for arguments in ((), (f"127.0.0.1:{free_port()}", 2, 0)):
    try:
        distributed.initialize(*arguments, timeout_s=float(sys.argv[1]))
    except (RuntimeError, TimeoutError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
raise SystemExit(3)
