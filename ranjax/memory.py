"""`ranjax.interpret.memory` by its public name."""

import sys

from ranjax.interpret import memory

sys.modules[__name__] = memory
