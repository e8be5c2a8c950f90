"""`python -m miles_api.cli`: the `miles` program of this very interpreter."""

import sys

from miles_api.cli.main import main

sys.exit(main())
