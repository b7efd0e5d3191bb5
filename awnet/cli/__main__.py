"""``python -m awnet.cli``: the same as ``awnet``, for torchrun."""

import sys

from awnet.cli import main

if __name__ == "__main__":
    sys.exit(main())
