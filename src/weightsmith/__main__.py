"""``python -m weightsmith`` is the command line."""

import sys

from weightsmith.cli import main

if __name__ == "__main__":
    sys.exit(main())
