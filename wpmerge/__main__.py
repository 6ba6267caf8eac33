"""``python -m wpmerge`` is ``wpmerge``."""

from wpmerge.cli import main

if __name__ == "__main__":
    main()
