"""Says that it is ready, then works until it is told to stop; process 1 does not listen."""

import os
import signal
import time

stopped = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
print("ready", flush=True)
while not stopped or os.environ["MTJAX_PROCESS_ID"] == "1":
    time.sleep(0.02)
print("saved", flush=True)
