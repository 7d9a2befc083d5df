"""``igrpo report RUN [RUN …]``: one self-contained page from run folders. It reads files only: no torch, no GPU."""
