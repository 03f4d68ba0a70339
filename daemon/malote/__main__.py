"""`python -m malote`."""

import sys

from malote.cli.main import main

sys.exit(main())
