"""``python -m cl_moe``: the same as ``cl-moe``."""

from cl_moe.cli import main

if __name__ == "__main__":
    main()
