"""`python -m jaxopt_lab.bench`."""

import sys

from jaxopt_lab.bench.command import main

sys.exit(main())
