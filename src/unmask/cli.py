"""Alias of `unmask.commands`, which installed programs and scripts name `unmask.cli`."""

from unmask.commands import app, main

__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
