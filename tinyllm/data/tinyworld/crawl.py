"""A world's texts as they would be found: on pages, with footers, invisible characters, copies, and pages that hold no text.

Whoever cleans and deduplicates them well gets the texts back as they were written, so that what was known of their distribution still
holds: that can be checked, and is.
"""
from collections.abc import Iterator
from itertools import islice

from tinyllm.backend import random_stream
from tinyllm.data.clean import CleanConfig
from tinyllm.data.text import Document
from tinyllm.data.tinyworld.world import World

TEXTS, BETWEEN = 12, "\n\n"  # on a page, and what stands between two
FOOTER = "You have read a page of the news of our small world. Come again tomorrow!"
SOILED = {"footer": 0.6, "invisible": 0.1, "line ends": 0.1}  # shares of pages
COPIED = {"copy": 0.04, "almost a copy": 0.04}  # of pages, that come once more later
JUNK = ("*-=-" * 60, "page page page page " * 30, "404")
JUNK_SHARE = 0.03


def crawl(world: World, pages: int, seed: int = 0) -> Iterator[Document]:
    """`pages` pages of texts of the mix, in random order with copies and junk besides. A pure function of (world, pages, seed)."""
    random = random_stream(seed, f"tinyworld {world.seed} crawl")
    texts = (item.text for item in world.documents("mix", pages * TEXTS, seed))
    kept: list[str] = []
    for number in range(pages):
        found = list(islice(texts, TEXTS))
        page = BETWEEN.join(found)
        chance = random.random()
        if chance < COPIED["copy"]:
            kept.append(page)
        elif chance < COPIED["copy"] + COPIED["almost a copy"]:
            kept.append(BETWEEN.join(found[:-1]))
        yield Document(_soiled(page, random), f"page {number + 1}")
        if random.random() < JUNK_SHARE:
            yield Document(JUNK[random.integers(len(JUNK))], f"junk {number + 1}")
    for number, page in enumerate(kept, 1):
        yield Document(_soiled(page, random), f"copy {number}")


def _soiled(page: str, random) -> str:
    if random.random() < SOILED["invisible"]:
        page = page.replace(" ", " \u200b", 3)
    if random.random() < SOILED["footer"]:
        page += f"{BETWEEN}{FOOTER}"
    return page.replace("\n", "\r\n") if random.random() < SOILED["line ends"] else page


def cleaning(pages: int) -> CleanConfig:
    """Rules that bring the pages back to what was written: texts are short and full of digits, and facts are said on many pages."""
    return CleanConfig(boilerplate=max(2, pages // 4), min_unique_words=0.05, min_letters=0.2, max_digits=0.7, max_repeated_signs=0.5, max_signs=0.6)


def texts_of(pages: Iterator[Document]) -> Iterator[Document]:
    """Each text of the pages by itself."""
    for page in pages:
        for number, text in enumerate(page.text.strip("\n").split(BETWEEN), 1):
            yield Document(text, f"{page.source}, text {number}")
