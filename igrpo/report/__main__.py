"""``python -m igrpo.report RUN [RUN …]``."""

import sys

from igrpo.report.command import main

if __name__ == "__main__":
    sys.exit(main())
