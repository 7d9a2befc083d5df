"""``python -m igrpo.eval``."""

import sys

from igrpo.eval.command import main

if __name__ == "__main__":
    sys.exit(main())
