"""Run the command line as ``python -m fastload``."""

from fastload.cli import main

if __name__ == "__main__":
    main()
