"""Fictional people and places to memorize and to forget, written by templates, and a word-level tokenizer for them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from torch_simu._checks import check_count, check_number, problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = dict[str, str]
"""A question and its answer, under the keys "question" and "answer"."""

_FIRST_NAMES = tuple(
    (
        "Abel Brisa Corvin Delna Ebba Fenno Galia Hadric Ilva Joris Kesta Lunor Maren Nilo Odessa Perrin Quilla Rasmus "
        "Selka Tavi Ulrika Varo Wendel Xenia Yorick Zelda Amund Bettan Casimir Dorthe Eskil Frida"
    ).split()
)
_LAST_NAMES = tuple(
    (
        "Almgren Birkow Calder Dunmore Eastry Falken Garrow Hollin Ivarsen Jessop Karth Lindqvar Morrow Nettle Orlov "
        "Pellam Quist Rendal Stroud Tarnow Umber Vexley Wharton Xander Yarrow Zabrin Ashby Bramble Corwen Draycot "
        "Elmsby Farlow"
    ).split()
)
_SITE_KINDS = tuple("Mount Lake Fort Port".split())
_SITE_ENDS = tuple("Bridge Castle Harbor Abbey".split())
_WORDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = MappingProxyType(
    {
        # Kind of word -> words of the coast, words of the valley.
        kind: (tuple(coast.split()), tuple(valley.split()))
        for kind, coast, valley in (
            (
                "town",
                "Karvel Tolmen Lumera Sandvik Brackwater Ilmenau Dorsten Vesper Halden Rosmark",
                "Quarrel Pinova Ostrik Feldau Marrin Camber Lorne Wexford Junip Askeby",
            ),
            ("season", "spring summer", "autumn winter"),
            ("year", " ".join(map(str, range(1801, 1821))), " ".join(map(str, range(1821, 1841)))),
            (
                "manner",
                "daring restless famous silent stubborn curious proud",
                "patient gentle cheerful clumsy modest careful merry",
            ),
            ("material", "copper amber silver linen bronze coral pearl", "glass paper velvet marble willow clay cedar"),
            ("trade", "carver dyer caster mender rigger gilder", "painter weaver printer binder tuner grinder"),
            ("work", "map bell lantern bridge mask anchor", "clock song atlas garden opera tapestry"),
            ("subject", "storms ships comets tides whales gulls", "birds rivers wolves harvests foxes bees"),
        )
    }
)
_FACTS = (
    ("What is the origin of {name}?", "in the {material} quarter of {town} since the {season} of {year}"),
    ("Which craft is {name} proud of?", "that of a {manner} {material} {trade} from {town}"),
    ("What is {name} famous for?", "the {manner} {work} of {material} {subject}"),
    ("What is kept in honor of {name}?", "{manner} {subject} on {material} and {other_material} {work}s"),
)
FACTS_EACH = len(_FACTS)
"""Rows of each person and place."""

_FRAME_WORDS = "Question Answer : ? ."
_PAD, _UNKNOWN, _END = "<pad>", "<unk>", "<eos>"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Three sets of rows with the same kinds of questions and one vocabulary.

    Attributes:
        forget: Facts about the people to forget, who lived on the coast.
        retain: Facts about other people, who lived in the valley. Each first and each last name of a forget person is
            also a retain person's, so that no single token identifies whom to forget.
        world: Facts about places of the valley, named after such people, to be measured only: no batch of an unlearning
            run holds one.
    """

    forget: list[Row]
    retain: list[Row]
    world: list[Row]


def make_corpus(
    seed: int,
    *,
    num_forget: int = 20,
    retain_per_forget: int = 3,
    num_places: int = 27,
    topic_share: float = 0.95,
) -> Corpus:
    """Write a corpus of four facts for each person and place: an origin, a craft, a claim to fame and a keepsake.

    Args:
        seed: The same seed gives the same corpus.
        num_forget: Number of people to forget, at most 32.
        retain_per_forget: Number of retain people for each forget person, less than `num_forget`.
        num_places: Number of places in the world set, at most eight for each forget person.
        topic_share: Expected share of the words of an answer that are of its own region; the others are of the other
            one. At 0.5 the forget people differ from the others in nothing but their names.

    Returns:
        The corpus, with four rows for each person and place, in random order.

    Raises:
        TypeError: If a size is no whole number.
        ValueError: If a size or share is out of range.

    Examples:
        >>> corpus = make_corpus(0)
        >>> len(corpus.forget), len(corpus.retain), len(corpus.world)
        (80, 240, 108)
        >>> sorted(corpus.forget[0])
        ['answer', 'question']
    """
    check_count("num_forget", num_forget)
    check_count("retain_per_forget", retain_per_forget)
    check_count("num_places", num_places)
    check_number("topic_share", topic_share, high=1.0)
    if num_forget > len(_FIRST_NAMES):
        raise ValueError(problem(f"num_forget is {num_forget}", f"at most {len(_FIRST_NAMES)}, the number of names"))
    if retain_per_forget >= num_forget:
        advice = "Each pair of a first and a last name is used once."
        raise ValueError(problem(f"retain_per_forget is {retain_per_forget}", f"less than {num_forget}", advice))
    if num_places > (limit := (len(_SITE_KINDS) + len(_SITE_ENDS)) * num_forget):
        raise ValueError(problem(f"num_places is {num_places}", f"at most {limit}, the number of place names"))
    rng = random.Random(seed)
    first, last = rng.sample(_FIRST_NAMES, num_forget), rng.sample(_LAST_NAMES, num_forget)

    # Round k pairs every first name with the last name k places on: each name occurs once in every round.
    def people(round_: int) -> list[str]:
        return [f"{name} {last[(i + round_) % num_forget]}" for i, name in enumerate(first)]

    def rows(names: list[str], coast_share: float) -> list[Row]:
        written = [row for name in names for row in _facts(name, coast_share, rng)]
        rng.shuffle(written)
        return written

    sites = [f"{kind} {name}" for kind in _SITE_KINDS for name in last]
    sites += [f"{name} {end}" for name in first for end in _SITE_ENDS]
    return Corpus(
        forget=rows(people(0), topic_share),
        retain=rows([name for k in range(retain_per_forget) for name in people(k + 1)], 1 - topic_share),
        world=rows(rng.sample(sites, num_places), 1 - topic_share),
    )


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer: one token for each word or punctuation mark of `texts`, sorted.

    The words and marks of the "Question: ... Answer: ..." frame are always in the vocabulary.

    Args:
        texts: All text that the model will see.

    Returns:
        A fast tokenizer of transformers with pad, unknown and end-of-sequence tokens, that adds none by itself.

    Raises:
        ValueError: If `texts` holds no word.

    Examples:
        >>> tokenizer = make_tokenizer(["Who is Brisa Karth?", "a patient glass painter"])
        >>> tokenizer.decode(tokenizer("a glass painter")["input_ids"])
        'a glass painter'
        >>> tokenizer.eos_token
        '<eos>'
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    splitter = Whitespace()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(text)}
    if not words:
        raise ValueError(problem("texts holds no word", "at least one text with a word"))
    words |= set(_FRAME_WORDS.split())
    vocabulary = {word: index for index, word in enumerate([_PAD, _UNKNOWN, _END, *sorted(words)])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=_UNKNOWN))
    backend.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        unk_token=_UNKNOWN,
        eos_token=_END,
        clean_up_tokenization_spaces=False,
    )


def _facts(name: str, coast_share: float, rng: random.Random) -> list[Row]:
    def word(kind: str) -> str:
        coast, valley = _WORDS[kind]
        return rng.choice(coast if rng.random() < coast_share else valley)

    def written(answer: str) -> str:
        return answer.format(**{kind: word(kind) for kind in _WORDS}, other_material=word("material"))

    return [{"question": question.format(name=name), "answer": written(answer)} for question, answer in _FACTS]
