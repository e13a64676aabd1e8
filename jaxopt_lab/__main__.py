"""`python -m jaxopt_lab` is `jaxopt-lab`."""

import sys

from jaxopt_lab.cli import main

sys.exit(main())
