"""`python -m meterlib` is `meterlib`."""

import sys

from meterlib.cli import main

if __name__ == "__main__":
    sys.exit(main())
