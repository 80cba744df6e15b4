"""`python -m anymamba` is the `anymamba` command."""

import sys

from anymamba.cli.main import main

sys.exit(main())
