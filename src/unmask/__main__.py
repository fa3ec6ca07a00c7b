"""`python -m unmask` is the command `unmask`."""

from unmask.commands import main

if __name__ == "__main__":
    main()
