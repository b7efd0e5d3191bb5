"""``python -m awnet``: the same as ``awnet``, for torchrun and where scripts are not on the path."""

import sys

from awnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
