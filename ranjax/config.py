"""`ranjax.training.config` by its public name."""

import sys

from ranjax.training import config

sys.modules[__name__] = config
