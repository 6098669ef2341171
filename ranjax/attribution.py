"""`ranjax.interpret.attribution` by its public name."""

import sys

from ranjax.interpret import attribution

sys.modules[__name__] = attribution
