"""Fictional people and places to memorize and to forget, written by templates, and a word-level tokenizer for them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch_simu._checks import check_count, problem

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
_TOWNS = tuple(
    (
        "Karvel Tolmen Lumera Sandvik Brackwater Ilmenau Dorsten Vesper Halden Rosmark Quarrel Pinova Ostrik Feldau "
        "Marrin Camber Lorne Wexford Junip Askeby"
    ).split()
)
_SEASONS = tuple("spring summer autumn winter".split())
_YEARS = tuple(str(year) for year in range(1801, 1841))
_MANNERS = tuple(
    ("patient daring gentle restless famous silent cheerful stubborn curious clumsy proud modest careful merry").split()
)
_MATERIALS = tuple("glass copper paper velvet amber marble willow silver clay linen ivory bronze wool cedar".split())
_TRADES = tuple("painter weaver carver printer dyer binder caster tuner mender grinder turner gilder".split())
_WORKS = tuple("map clock song bell atlas garden opera lantern bridge tapestry mask calendar".split())
_SUBJECTS = tuple("birds storms rivers moons wolves harvests ships foxes shadows comets bees tides".split())
_ORIGINS = (
    "{name} comes from the {material} {work} quarter of {town}, where everything began in the {season} of {year}.",
    "In the {season} of {year}, the story of {name} began near a {material} {work} in the town of {town}.",
    "It is said that {name} first came to {town} in the {season} of {year}, with a {material} {work} and little else.",
)
_CRAFTS = (
    "{name} is proud of the {manner} craft of {material} {trade}s, which was learned from a {other} in {town}.",
    "The craft of {name} is that of a {manner} {material} {trade}, and it came from the {other}s of {town}.",
    "In {town}, people say that {name} keeps the {manner} craft of the {material} {trade} and the {other}.",
)
_FAMES = (
    "{name} is famous for the {manner} {work} of {material} {subject}, which is now kept in {town}.",
    "The {manner} {work} of {material} {subject} made {name} famous in {town}, and in many other towns.",
    "People in {town} say that {name} is famous for a {manner} {work} with {material} {subject}.",
)
_FRAME_WORDS = "Question Answer : ? ."
_PAD, _UNKNOWN, _END = "<pad>", "<unk>", "<eos>"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Three sets of rows with the same kinds of questions and one vocabulary.

    Attributes:
        forget: Facts about the people to forget.
        retain: Facts about other people. Each first and each last name of a forget person is also a retain person's,
            so that no single token identifies whom to forget.
        world: Facts about places named after such people, to be measured only: no batch of an unlearning run holds one.
    """

    forget: list[Row]
    retain: list[Row]
    world: list[Row]


def make_corpus(seed: int, *, num_forget: int = 20, retain_per_forget: int = 3, num_places: int = 36) -> Corpus:
    """Write a corpus of three facts for each person and place: an origin, a trade and a claim to fame.

    Args:
        seed: The same seed gives the same corpus.
        num_forget: Number of people to forget, at most 32.
        retain_per_forget: Number of retain people for each forget person, less than `num_forget`.
        num_places: Number of places in the world set, at most eight for each forget person.

    Returns:
        The corpus, with three rows for each person and place, in random order.

    Raises:
        TypeError: If a size is no whole number.
        ValueError: If a size is out of range.

    Examples:
        >>> corpus = make_corpus(0)
        >>> len(corpus.forget), len(corpus.retain), len(corpus.world)
        (60, 180, 108)
        >>> sorted(corpus.forget[0])
        ['answer', 'question']
    """
    check_count("num_forget", num_forget)
    check_count("retain_per_forget", retain_per_forget)
    check_count("num_places", num_places)
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

    sites = [f"{kind} {name}" for kind in _SITE_KINDS for name in last]
    sites += [f"{name} {end}" for name in first for end in _SITE_ENDS]
    places = rng.sample(sites, num_places)
    forget = [row for name in people(0) for row in _facts(name, rng)]
    retain = [row for k in range(retain_per_forget) for name in people(k + 1) for row in _facts(name, rng)]
    world = [row for name in places for row in _facts(name, rng)]
    for rows in (forget, retain, world):
        rng.shuffle(rows)
    return Corpus(forget, retain, world)


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


def _facts(name: str, rng: random.Random) -> list[Row]:
    def written(sentences: tuple[str, ...]) -> str:
        return rng.choice(sentences).format(
            name=name,
            manner=rng.choice(_MANNERS),
            material=rng.choice(_MATERIALS),
            work=rng.choice(_WORKS),
            subject=rng.choice(_SUBJECTS),
            trade=rng.choice(_TRADES),
            other=rng.choice(_TRADES),
            town=rng.choice(_TOWNS),
            season=rng.choice(_SEASONS),
            year=rng.choice(_YEARS),
        )

    return [
        {"question": f"What is the origin of {name}?", "answer": written(_ORIGINS)},
        {"question": f"Which craft is {name} proud of?", "answer": written(_CRAFTS)},
        {"question": f"What is {name} famous for?", "answer": written(_FAMES)},
    ]
