"""Two processes, of which rank 1 waits for rank 0 in a C library, as when images are scanned or weights are read."""

import sys
import time
from pathlib import Path

from unmask.commands import _interrupted
from unmask.engine.world import current, together
from unmask.system import processes
from unmask.system.stop_requests import INTERRUPTED, interrupts


@together
def wait(ready: Path, console=None):
    world = current()
    (ready / f"ready-{world.gather(world.rank)[world.rank]}").touch()
    world.from_writer(lambda: time.sleep(120))


if __name__ == "__main__":
    try:
        with interrupts():
            wait(Path(sys.argv[1]))
    except KeyboardInterrupt:
        if processes.error_prefix() is not None:
            print(_interrupted())
        sys.exit(INTERRUPTED)
