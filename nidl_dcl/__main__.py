"""``python -m nidl_dcl`` is the command ``nidl-dcl``."""

from nidl_dcl.cli import main

if __name__ == "__main__":
    main()
