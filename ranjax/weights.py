"""`ranjax.interpret.weights` by its public name."""

import sys

from ranjax.interpret import weights

sys.modules[__name__] = weights
