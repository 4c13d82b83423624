"""`python -m regpt2` is the command `regpt2`."""

import sys

from regpt2.cli import main

if __name__ == "__main__":
    sys.exit(main())
