"""``python -m cl_moe.tracking.compare``: the command ``cl-moe-compare``."""

from cl_moe.tracking.compare.command import main

if __name__ == "__main__":
    main()
