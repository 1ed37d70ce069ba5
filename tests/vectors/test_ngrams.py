import numpy as np

from curate.vectors.ngrams import hashed_ngrams


def test_each_ngram_has_one_place_and_one_sign():
    one = hashed_ngrams(["cat", "Cat!", "cat cat cat"], dim=64, ngrams=(1, 1), unit="words")
    place = np.flatnonzero(one[0])
    assert len(place) == 1
    assert abs(one[0, place[0]]) == np.float32(np.log(2))
    np.testing.assert_array_equal(one[0], one[1])  # case and marks do not count
    assert abs(one[2, place[0]]) == np.float32(np.log(4))
    assert np.sign(one[2, place[0]]) == np.sign(one[0, place[0]])


def test_inner_products_are_those_of_the_counts():
    rng = np.random.default_rng(0)
    words = [f"w{number}" for number in range(300)]
    texts = [" ".join(rng.choice(words, 60, replace=False)) for _ in range(30)]
    found = hashed_ngrams(texts, dim=1 << 16, ngrams=(1, 1), unit="words")
    sets = [set(text.split()) for text in texts]
    shared = np.array([[len(a & b) for b in sets] for a in sets]) * np.log(2) ** 2
    assert np.abs(found @ found.T - shared).max() <= 2 * 2 * np.log(2) ** 2  # a collision or two


def test_runs_of_words_and_of_characters():
    pairs = hashed_ngrams(["a b c"], dim=1 << 16, ngrams=(2, 2), unit="words")
    assert np.count_nonzero(pairs) == 2
    whole = hashed_ngrams(["a b c"], dim=1 << 16, ngrams=(1, 3), unit="words")
    assert np.count_nonzero(whole) == 6
    letters = hashed_ngrams(["东京都"], dim=1 << 16, ngrams=(1, 2), unit="characters")
    assert np.count_nonzero(letters) == 5


def test_a_text_without_ngrams_has_no_vector():
    found = hashed_ngrams(["", "...", "word"] * 2_000, dim=8, ngrams=(1, 1), unit="words")
    assert np.isnan(found[0::3]).all()
    assert np.isnan(found[1::3]).all()
    assert np.isfinite(found[2::3]).all()
    assert (found[2::3] == found[2]).all()
