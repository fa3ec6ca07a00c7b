"""Time how long `unmask --help`, `import unmask` and imports of other libraries take.

    python benchmarks/startup.py [--rounds 7] [--json] [--keep]

Every command runs in its own process, in turns, with the files in the page cache. `torch` is True if torch had been
imported when the command ended. --tiny runs two of the commands once, for the test of this script.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec

from measure import command_line, conclude, origin, spread, timings

LAST_WORD = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); "
COMMANDS = {
    "python": "pass",
    "unmask --help": "from unmask.commands import main; sys.argv = ['unmask', '--help']; main()",
    "unmask pretrain --help": "from unmask.commands import main; sys.argv = ['unmask', 'pretrain', '--help']; main()",
    "import unmask": "import unmask",
    "import unmask.data.sources.open_source": "import unmask.data.sources.open_source",
    "import torch": "import torch",
    "unmask.load_encoder": "import unmask; unmask.load_encoder",
    "import transformers": "import transformers",
    "transformers.ViTMAEForPreTraining": "from transformers import ViTMAEForPreTraining",
}
TINY = ("python", "unmask --help")


def process(code: str) -> Callable[[], str]:
    """Return a function that runs the code in a new process and returns the last word of its stderr."""

    def call() -> str:
        done = subprocess.run([sys.executable, "-c", LAST_WORD + code], check=True, capture_output=True, text=True)
        return done.stderr.split()[-1]

    return call


def main() -> None:
    options = command_line(__doc__, rounds=7, result="startup").parse_args()
    names = [name for name in COMMANDS if "transformers" not in name or find_spec("transformers")]
    rivals = {name: process(COMMANDS[name]) for name in (TINY if options.tiny else names)}
    found = timings(rivals, rounds=1 if options.tiny else options.rounds)
    rows = [
        {"command": name, **{f"{key}_s": value for key, value in spread(seconds).items()}, "torch": rivals[name]()}
        for name, seconds in found.items()
    ]
    conclude("startup", rows, origin(), as_json=options.json, keep=options.keep)


if __name__ == "__main__":
    main()
