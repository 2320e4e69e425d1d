import pytest
import torch

from oasis_helpers.data import load_factors, read_slices
from oasis_helpers.prompts import LENGTH, SLOTS, VOCABULARY, phrases, read, tokenize, tokens, truths, words_of
from oasis_helpers.seeds import generator

NAMES = [slot.name for slot in SLOTS]


def _heads(count, seed=0):
    """What may be true of a slice, from end to end of every slot."""
    low, high = torch.tensor([[1, 0, 13, 520, 4.4, 4.0], [32, 1, 82, 615, 6.4, 6.0]])
    drawn = torch.rand((count, 6), generator=torch.Generator().manual_seed(seed))
    rows = low + (high - low) * drawn
    rows[:, 0] = rows[:, 0].round()
    return rows


def test_truths_are_those_of_the_head_and_the_slice(phantoms):
    slices = read_slices(phantoms.train, 16)
    found = truths(load_factors(phantoms), slices.case, slices.plane)
    of = load_factors(phantoms)[2]
    brain = (of.csf_mm3 + of.grey_mm3 + of.white_mm3) / 1000
    # the second case, its third slice of four
    expected = torch.tensor([3, of.atrophy, of.ventricle_mm3 / 1000, brain, of.scalp, of.skull])
    assert torch.allclose(found[4 + 2], expected)
    with pytest.raises(ValueError, match=r"phantoms.csv says nothing of case 2"):
        truths({1: of}, slices.case, slices.plane)


def test_a_phrase_says_what_is_true():
    known = _heads(1500)
    texts = phrases(known, generator(0))
    said = [read(text) for text in texts]  # none of them is refused
    for place, slot in enumerate(SLOTS):
        both = zip(said, known[:, place].tolist())
        told = [(found[slot.name], truth) for found, truth in both if slot.name in found]
        assert len(told) > 100
        for value, truth in told:
            if value in slot.words:
                low, high = slot.words[value]
                assert low <= truth <= high
            else:
                assert abs(float(value) - truth) <= slot.step / 2 + 1e-6
        ways = {value for value, _ in told}
        assert ways >= {*slot.words, *(slot.written(number) for number in slot.numbers)}


def test_phrases_differ_in_length_order_and_wording():
    head = torch.tensor([[20, 0.3, 20, 600, 6.0, 4.2]])
    texts = phrases(head.expand(800, 6), generator(1))
    assert len(set(texts)) > 500
    said = [set(read(text)) for text in texts]
    counts = torch.bincount(torch.tensor([len(s) for s in said]), minlength=7)
    assert (counts > 15).all()  # from nothing to everything
    for name in NAMES:  # each alone, and each left out of long ones
        assert {name} in said
        assert any(len(s) == 5 and name not in s for s in said)
    firsts = {text.split(",")[0].split(" with ")[-1] for text in texts}
    assert sum(any(w in first for first in firsts) for w in ("ventricles", "atrophy", "scalp", "skull")) == 4


def test_phrases_come_from_the_generator_alone():
    known = _heads(20)
    torch.manual_seed(0)
    first = phrases(known, generator(3, 7))
    torch.manual_seed(1)
    assert phrases(known, generator(3, 7)) == first
    assert phrases(known, generator(3, 8)) != first
    # a row's phrase does not hang on what is true of the others
    known[1:] = _heads(20, seed=1)[1:]
    assert phrases(known, generator(3, 7))[0] == first[0]


def test_what_is_unknown_or_between_two_words_is_not_said():
    nothing = torch.full((50, 6), torch.nan)
    assert all(read(text) == {} for text in phrases(nothing, generator(0)))
    between = torch.tensor([[8.0, 0.42, 30, 570, 5.4, 5.0]]).expand(200, 6)
    said = [read(text) for text in phrases(between, generator(0))]
    assert set().union(*said) == {"height", "atrophy", "ventricles"}
    assert all(found.get("height", "8") == "8" and found.get("atrophy", "0.4") == "0.4" for found in said)


def test_tokens_are_places_in_the_vocabulary():
    text = "Axial slice, with ventricles of 40 ml;  at 14mm"
    found = tokenize(text)
    assert found.shape == (1, LENGTH)
    words = [VOCABULARY[place] for place in found[0].tolist() if place >= 0]
    assert words == ["axial", "slice", "with", "ventricles", "of", "40", "ml", "at", "14", "mm"]
    assert found[0, len(words) :].eq(-1).all()
    assert torch.equal(tokenize([text, "thin scalp"])[0], found[0])
    texts = phrases(_heads(300), generator(0))
    assert torch.equal(tokens(texts), tokenize(texts))
    assert max(len(words_of(text)) for text in texts) < LENGTH
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 1 + int(tokens(_everything()).max())


def _everything():
    return phrases(_heads(2000), generator(5))


def test_the_vocabulary_is_that_of_the_weights():
    # Weights hold it: a changed grammar needs new ones. So it may not change by accident.
    assert tuple(sorted(VOCABULARY)) == VOCABULARY
    assert len(VOCABULARY) == 86


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "the prompt is empty: say something, such as"),
        (" ,;", "the prompt is empty"),
        ("axial slice, mild atrofy", "the word 'atrofy' is unknown: the nearest known are 'atrophy'"),
        ("große Ventrikel", "the word 'große' is unknown"),
        ("xyzzy", "the word 'xyzzy' is unknown: say such as at the level of the basal ganglia"),
        ("marked ventricles", "'marked' fits nothing here: say such as"),
        ("40", "'40' fits nothing here"),
        ("atrophy 0.63", "atrophy 0.63 cannot be said: the grammar has 0.0 to 1.0; the nearest are '0.6' or"),
        ("atrophy -0.5", "atrophy -0.5 cannot be said"),
        ("ventricles of 200 ml", "ventricles 200 cannot be said: the grammar has 15 to 80"),
        ("at 33 mm", "height 33 cannot be said: the grammar has 1 to 32"),
        ("no atrophy, atrophy 0.6", "says atrophy twice"),
        ("at the level of the thalamus at 20 mm", "says height twice"),
        ("a " * (LENGTH + 1), "has 33 words: this network reads 32"),
    ],
)
def test_prompts_that_cannot_be_read(text, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        tokenize(["thin scalp", text])
    assert "\n" not in str(caught.value)


def test_prompts_are_read():
    found = read("A HEAD with marked atrophy, ventricles of 60 ml and a thick skull, level of the thalamus")
    assert found == {"height": "thalamus", "atrophy": "marked", "ventricles": "60", "skull": "thick"}
    assert read("small brain at 3 mm") == {"head": "small", "height": "3"}
    assert read("axial slice") == {}
