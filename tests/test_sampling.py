"""Drawing of tokens, and text from them."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ranjax.data.vocabulary import Bytes, Characters, Words
from ranjax.lm import LanguageModel
from ranjax.sampling import Sampling, generate, prompt_ids, sample, stream

VOCABULARY = 15
KEYS = jax.random.split(jax.random.key(0), 500)


@pytest.fixture(scope="module")
def trained():
    """A model with random weights, which differ enough for its greedy text to vary."""
    model = LanguageModel(VOCABULARY, layers=1, features=8)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32), deterministic=True)["params"]
    params = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)
    return SimpleNamespace(model=model, params=params)


def drawn(**options):
    """How often each of four tokens is drawn."""
    logits, sampling = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])), Sampling(**options)
    return np.bincount(jax.vmap(lambda key: sample(key, logits, sampling))(KEYS), minlength=4) / len(KEYS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_k": 2**40}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_p": 0.81}, [0.526, 0.316, 0.158, 0]),
        ({"top_p": 0.81, "top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"temperature": 1e200}, [0.25] * 4),
        ({"temperature": 0.5}, np.square([0.5, 0.3, 0.15, 0.05]) / 0.365),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_of_the_options(options, expected):
    frequencies = drawn(**options)
    np.testing.assert_allclose(frequencies, expected, atol=0.06)
    np.testing.assert_array_equal(frequencies[np.array(expected) == 0], 0)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_k": 1}, {"top_p": 0.4}, {"top_p": 1e-50}])
def test_the_likeliest_token_alone_is_drawn(options):
    np.testing.assert_array_equal(drawn(**options), [1, 0, 0, 0])


def test_of_equally_likely_tokens_only_as_many_as_asked_for_are_drawn():
    alike = jnp.array([0.0, 1.0, 1.0, 1.0])
    for options in ({"top_k": 1}, {"top_p": 0.2}):
        assert {int(sample(key, alike, Sampling(**options))) for key in KEYS[:20]} == {1}
    assert {int(sample(key, alike, Sampling(top_k=2))) for key in KEYS[:20]} == {1, 2}


def test_the_last_of_many_tokens_is_drawn():
    """In float32 the probabilities reach 1 before it."""
    tokens = jax.vmap(lambda key: sample(key, jnp.zeros(40_000), Sampling()))(KEYS[:200])
    assert int(tokens.max()) > 39_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 2.5}, r"`top_k` must be a whole number, at least 1, or None; got 2\.5"),
        ({"top_k": 0}, "`top_k` must be a whole number, at least 1, or None; got 0"),
        ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\]; got 0\.0"),
        ({"top_p": 1.5}, r"`top_p` must be in \(0, 1\]; got 1\.5"),
        ({"temperature": math.nan}, "`temperature` must be finite and at least 0; got nan"),
        ({"temperature": -1.0}, r"`temperature` must be finite and at least 0; got -1\.0"),
        ({"temperature": "x"}, "`temperature` must be finite and at least 0; got 'x'"),
        ({"temperature": True}, "`temperature` must be finite and at least 0; got True"),
        ({"top_p": None}, r"`top_p` must be in \(0, 1\]; got None"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize("seed", [-1, 2**31, 10**30, 0.5, True, None])
def test_a_seed_out_of_range_is_refused(seed, trained):
    with pytest.raises(ValueError, match=r"`seed` must be a whole number in \[0, 2\*\*31\); got"):
        generate(trained, [0], 3, Sampling(), seed)


@pytest.mark.parametrize("cell", ["ran", "lstm"])
def test_every_token_is_drawn_given_all_before_it(cell, trained):
    if cell != "ran":
        model = LanguageModel(VOCABULARY, cell=cell, layers=2, features=8)
        params = model.init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32), deterministic=True)["params"]
        trained = SimpleNamespace(model=model, params=jax.tree.map(lambda p: 3 * p, params))
    prompt = [3, 1, 4, 1, 5]
    ids = [*prompt, *generate(trained, prompt, 20, Sampling(temperature=0), seed=0)]
    logits, _ = trained.model.apply({"params": trained.params}, np.array([ids[:-1]]), deterministic=True)
    np.testing.assert_array_equal(ids[5:], jnp.argmax(logits[0, 4:], axis=-1))


def test_draws_differ_from_token_to_token_and_from_seed_to_seed(trained):
    texts = [list(generate(trained, [0], 40, Sampling(temperature=1e6), seed)) for seed in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]
    assert min(len(set(ids)) for ids in texts) > 5


def test_of_a_prompt_only_the_last_token_has_logits(trained, monkeypatch):
    shapes, logits = [], LanguageModel.logits
    monkeypatch.setattr(
        LanguageModel, "logits", lambda self, hidden: shapes.append(hidden.shape) or logits(self, hidden)
    )
    list(generate(trained, [0] * 50, 3, Sampling(), seed=0))
    assert max(math.prod(shape[:-1]) for shape in shapes) == 1


def test_a_second_text_is_not_compiled_for_again(trained, caplog):
    jax.clear_caches()
    texts, compiled = [], []
    for _ in range(2):
        caplog.clear()
        again = SimpleNamespace(model=LanguageModel(VOCABULARY, layers=1, features=8), params=trained.params)
        with jax.log_compiles():
            texts.append(list(generate(again, [0, 1], 5, Sampling(0.7), seed=0)))
        compiled.append(any("Compiling jit(advance)" in record.getMessage() for record in caplog.records))
    assert texts[0] == texts[1]
    assert compiled == [True, False]


@pytest.mark.parametrize(
    ("prompt", "length", "message"),
    [
        ([1, 15], 3, "`prompt` must be whole numbers from 0 to 14, the model's; got int64 from 1 to 15"),
        ([-1], 3, "`prompt` must be whole numbers from 0 to 14, .* from -1 to -1"),
        ([[1, 2]], 3, r"`prompt` must be the ids of one text, \(tokens,\); got the shape \(1, 2\)"),
        ("cat", 3, "`prompt` must be whole numbers from 0 to 14, the model's; got 'cat'"),
        (["c", "a"], 3, r"`prompt` must be whole numbers from 0 to 14, the model's; got \['c', 'a'\]"),
        ([], 3, "`prompt` must have at least one id; got none"),
        ([1], -3, "`length` must be a whole number, at least 1; got -3"),
    ],
)
def test_a_prompt_that_is_not_the_models_is_refused_before_a_token_is_drawn(prompt, length, message, trained):
    with pytest.raises(ValueError, match=message):
        generate(trained, prompt, length, Sampling(), seed=0)


def test_an_empty_prompt_is_the_beginning_of_a_line_or_the_first_token():
    assert prompt_ids(Characters("\nab"), "").tolist() == [0]
    assert prompt_ids(Words(("a", "<eos>")), "").tolist() == [1]
    assert prompt_ids(Characters("ab"), "").tolist() == [0]
    assert prompt_ids(Characters("ab"), "ba").tolist() == [1, 0]


def written(vocabulary, ids, begun=""):
    parts = []
    stream(vocabulary, iter(ids), parts.append, begun)
    return parts


def test_words_are_separated_but_at_the_ends_of_lines():
    assert "".join(written(Words(("<eos>", "a", "b")), [1, 2, 0, 1], "a")) == " a b\na"
    assert written(Words(("<eos>", "a")), [1])[0] == "a"  # as on a line of its own
    assert written(Words(("<eos>", "a", "\ufffd")), [1, 2], "a")[:2] == [" a", " \ufffd"]  # a word is whole


@pytest.mark.parametrize(("text", "expected"), [("é!", ["é", "!", ""]), ("😀", ["😀", ""])])
def test_bytes_are_written_as_whole_characters(text, expected):
    vocabulary = Bytes.build(text.encode())
    assert written(vocabulary, vocabulary.encode(text).tolist()) == expected


def test_bytes_that_begin_no_character_are_written_while_the_text_goes_on():
    parts, before = [], []

    def ids():
        for _ in range(20):
            before.append(len(parts))
            yield 0

    stream(Bytes((0xFF, 97)), ids(), parts.append, "")
    assert before[-1] >= 1
