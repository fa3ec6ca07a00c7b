"""Alias of `unmask.commands`, for installed programs and scripts that import `unmask.cli`."""

from unmask.commands import app, main

__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
