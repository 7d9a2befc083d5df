"""``python -m igrpo.plan``."""

import sys

from igrpo.plan.command import main

if __name__ == "__main__":
    sys.exit(main())
