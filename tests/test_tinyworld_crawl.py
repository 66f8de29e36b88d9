"""A crawl of tinyworld: cleaning and deduplication give back what was written, and nothing else."""
import json
from collections import Counter

import pytest

from tinyllm.data import DedupConfig, clean_into, deduplicate_into, read_documents
from tinyllm.data.tinyworld import World
from tinyllm.data.tinyworld.crawl import COPIED, FOOTER, JUNK, TEXTS, cleaning, crawl, texts_of

PAGES = 300


@pytest.fixture(scope="module")
def pages():
    return list(crawl(World(0), PAGES, seed=3))


def test_it_is_soiled(pages):
    texts = [page.text for page in pages]
    assert any(FOOTER in text for text in texts) and any("\r\n" in text for text in texts) and any("\u200b" in text for text in texts)
    assert any(text.startswith(junk) for text in texts for junk in JUNK)
    assert PAGES * (1 + sum(COPIED.values()) / 3) < len(pages) < PAGES * (1 + 4 * sum(COPIED.values()))


def test_it_is_a_function_of_its_arguments(pages):
    assert pages == list(crawl(World(0), PAGES, seed=3)) != list(crawl(World(0), PAGES, seed=4))


def test_what_is_left_is_what_was_written(pages, tmp_path):
    """All texts come back unchanged, each as often as it was written: what is known of their distribution holds for what is learned."""
    written = Counter(item.text for item in World(0).documents("mix", PAGES * TEXTS, 3))
    (tmp_path / "clean").mkdir()
    (tmp_path / "unique").mkdir()
    clean_into(tmp_path / "clean", pages, cleaning(len(pages)))
    cleaned = list(read_documents([tmp_path / "clean" / "kept.jsonl"]))
    figures = deduplicate_into(tmp_path / "unique", cleaned, DedupConfig())
    left = Counter(document.text for document in texts_of(read_documents([tmp_path / "unique" / "kept.jsonl"])))
    assert left == written
    assert figures["exact"] and figures["near"]
    dropped = [json.loads(line) for line in (tmp_path / "clean" / "dropped.jsonl").read_text().splitlines()]
    assert dropped and all(record["source"].startswith("junk") for record in dropped)
