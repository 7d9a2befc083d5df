"""``python -m igrpo VERB …``."""

import sys

from igrpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
