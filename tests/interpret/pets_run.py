"""A small untrained model of words with its vocabulary, as `explain` takes it."""

from types import SimpleNamespace

import jax
import numpy as np

from ranjax.data.vocabulary import Words
from ranjax.lm import LanguageModel

PETS = "the cat sat on the mat\nthe dog sat on the log\nthe cat saw the <script>alert(1)</script> dog\n"


def pets_run():
    """Two layers of 8 components, the words of `PETS`."""
    vocabulary = Words.build(PETS)
    model = LanguageModel(len(vocabulary), features=8)
    params = model.init(jax.random.key(0), np.zeros((1, 2), np.int32), deterministic=True)["params"]
    return SimpleNamespace(model=model, params=jax.tree.map(lambda p: 2 * p, params), vocabulary=vocabulary)
