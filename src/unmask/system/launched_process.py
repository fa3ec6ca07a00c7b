"""A process that `unmask launch` has started: it reports its exit code to the launcher, and ends with it.

torchrun restarts the processes after every exit code but 0. Restarting helps neither after wrong input nor after a stop
on request, so the code goes to a file, and torchrun sees 0. Processes started by torchrun directly are not affected.
This module imports the standard library only.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from unmask.system.processes import end_with

FOLDER, LAUNCHER = "UNMASK_LAUNCH_FOLDER", "UNMASK_LAUNCH_PROCESS"
"""Environment variables: the folder of the files, and the process id of the launcher."""
STOP = "stop"
"""Name of the file that exists if a stop was requested; a process that starts after that ends at once."""
USAGE, STOPPED = 2, 75
NOT_RESTARTED = (0, USAGE, STOPPED, 130)

_this: LaunchedProcess | None = None


class LaunchedProcess:
    """The part of a process in `unmask launch`. It has no effect in processes that were started otherwise.

    ends_with: exit code with which the process must end at once, because restarting does not help; else None.
    """

    def __init__(self) -> None:
        global _this
        _this = self
        folder, launcher = os.environ.pop(FOLDER, None), os.environ.pop(LAUNCHER, "")
        self._file: Path | None = None
        self.ends_with: int | None = None
        if folder is None:
            return
        end_with(int(launcher))
        self._file = code_file(Path(folder), int(os.environ["RANK"]))
        if USAGE in read_codes(Path(folder)).values():  # before a restart
            self.ends_with = USAGE
        elif (Path(folder) / STOP).exists():
            self.ends_with = STOPPED
        else:
            self._file.unlink(missing_ok=True)

    def exit_code(self, code: int) -> int:
        """Report the exit code of the command, and return the code with which the process must exit."""
        if self._file is None or code not in NOT_RESTARTED:
            return code
        with suppress(OSError):
            self._file.write_text(str(code))
            return 0
        return code


def exit_at_once(code: int) -> NoReturn:
    """End this process without cleaning up, with the exit code of the command, which is reported."""
    os._exit(code if _this is None else _this.exit_code(code))


def code_file(folder: Path, rank: int) -> Path:
    """Return the file for the exit code of a process."""
    return folder / f"{rank}.code"


def read_codes(folder: Path) -> dict[int, int]:
    """Return {rank: reported exit code}."""
    texts = {int(file.stem): file.read_text() for file in folder.glob("*.code")}
    return {rank: int(text) for rank, text in texts.items() if text}
